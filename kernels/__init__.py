"""Triton kernels, one file per op: the kernel and a launcher with the kernel op's arguments.

They import torch and triton and nothing of rlhf_fast; installed as ``rlhf_fast.kernels``.
"""
