from rlhf_fast.moved import moved

if __name__ == "__main__":  # python -m rlhf_fast.cli
    import sys

    from rlhf_fast.trainer.cli import main

    sys.exit(main())
moved(__name__, "rlhf_fast.trainer.cli")
