"""The kernels' tests run them in Triton's interpreter."""

import torch
from support import interpreter

if not torch.cuda.is_available():
    interpreter.install()
