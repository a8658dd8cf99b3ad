"""The PTX that Triton makes for sm_90, interpreted: compiled kernels run with no GPU.

All threads of a launch are the entries of numpy arrays: an instruction is a few numpy calls.

Modelled, and an error (``Fault``) where a kernel breaks it:

* divergence: the threads with the lowest program counter go on, and meet the others there;
  an instruction of a whole warp (shfl, redux, ldmatrix) in a warp that has parted is an error;
* barriers: all threads of a block, at one instruction;
* shared memory: what no barrier orders (a write after a read or write, or a read after a write, of
  another thread), reads of bytes that nobody has written, bounds, alignment;
* global memory: bounds by the byte, alignment, and a byte that two programs of a launch write.
  A load may read beyond a tensor where kernels/alignment.py says so: in the 16 bytes (the 32 of two
  dtypes' rows) of one of its elements. That is counted, and reads as NaN.

Numbers: float32 and integers as IEEE and PTX have them. ``fma.rn.f32`` is a float64 one rounded
again, which may differ in the last bit once in 2^29; ``fma.rn.f64`` is as exact. The approximate
instructions are modelled as exactly rounded: PTX grants ex2.approx and lg2.approx 2 ulp, div.full
2 ulp, sqrt.approx 1; only rcp.approx.ftz.f64 is as coarse as documented, 20 bits.

Not modelled: time, caches, the order of memory between programs, atomics (no kernel has any), and
what ptxas makes of the PTX. An instruction that is not in the table is an ``UnknownInstruction``.
"""
