"""The fast forms of the operations.

    dispatch.py        which implementation of an operation runs
    cpu_*.py           forms that are tuned on CPUs: oneDNN products, blocked attention, batched
                       experts, scratch buffers, gradients written by hand
    gpu_attention.py   which of PyTorch's attention kernels to use on a GPU
    triton.py          calls of the Triton kernels of `nemotron_kernels`
    constants.py       constant tensors that are made once
    private_torch.py   every private operator of PyTorch that we call, each with a public fallback

What an operation computes is defined in `ops/`, and every form here is tested against it.
"""
