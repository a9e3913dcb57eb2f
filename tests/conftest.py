"""Without a GPU the kernels run under Triton's interpreter, to be chosen before its import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
