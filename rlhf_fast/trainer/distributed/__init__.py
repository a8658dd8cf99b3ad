"""Many processes: data parallelism, FSDP2, DeepSpeed's ZeRO."""
