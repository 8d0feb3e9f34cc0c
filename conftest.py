"""Where there is no GPU, Triton runs in its interpreter; it reads this when it is imported, by whichever test comes first."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
