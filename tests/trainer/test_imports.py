"""Importing rlhf_fast changes nothing of the process: its owner may not even train with it."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import gc, importlib, json, locale, logging, os, pkgutil, random, signal, socket, sys, warnings
warnings.simplefilter("ignore")
import accelerate, datasets, huggingface_hub, matplotlib, numpy, rich, torch, transformers, yaml
import accelerate.tracking, accelerate.utils, matplotlib.pyplot, multiprocessing, tempfile
import rich.progress, rich.table  # draws from random
import torch._dynamo, torch._inductor.config, transformers.integrations
from huggingface_hub.utils import are_progress_bars_disabled

def state():
    root = logging.getLogger()
    names = ["", "transformers", "datasets", "accelerate", "huggingface_hub", "torch", "rich"]
    loggers = [logging.getLogger(name) for name in names]
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "path": sys.path[:],
        "bars": [datasets.are_progress_bars_disabled(), are_progress_bars_disabled(),
                 transformers.utils.logging.is_progress_bar_enabled()],
        "logging": [(x.level, len(x.handlers), x.propagate, x.disabled) for x in loggers],
        "verbosity": [datasets.logging.get_verbosity(), transformers.logging.get_verbosity()],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "torch": [str(torch.get_default_dtype()), torch.is_grad_enabled(),
                  torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled,
                  torch.are_deterministic_algorithms_enabled(), str(torch.get_default_device()),
                  torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark,
                  torch._dynamo.config.cache_size_limit, torch._dynamo.config.suppress_errors],
        "random": [torch.random.get_rng_state().sum().item(), hash(random.getstate()),
                   int(numpy.random.get_state()[1].sum())],
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "hooks": [sys.excepthook.__name__, sys.displayhook.__name__, sys.getrecursionlimit(),
                  gc.get_threshold(), gc.isenabled(), sys.getswitchinterval()],
        "warnings": [str(f) for f in warnings.filters], "locale": locale.setlocale(locale.LC_ALL),
        "plots": [matplotlib.get_backend(), str(sorted(matplotlib.rcParams.items()))],
        "numpy": [numpy.geterr(), str(numpy.get_printoptions())],
        "start method": multiprocessing.get_start_method(allow_none=True),
        "timeout": socket.getdefaulttimeout(), "temporary": tempfile.tempdir,
    }

before = state()
import rlhf_fast
packages = pkgutil.walk_packages(rlhf_fast.__path__, "rlhf_fast.", onerror=lambda name: None)
names = [p.name for p in packages if "integrations" not in p.name and "kernels" not in p.name]
for name in names:
    importlib.import_module(name)
after = state()
print(json.dumps([names, {k: [before[k], after[k]] for k in before if before[k] != after[k]}]))
"""


@pytest.mark.long
def test_imports_change_nothing_of_the_process():
    """Every module in a fresh interpreter, after the libraries they import."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names, changed = json.loads(done.stdout.splitlines()[-1])
    assert {"rlhf_fast.ppo", "rlhf_fast.trainer.reward", "rlhf_fast.trainer.cli"} <= set(names)
    assert not changed
