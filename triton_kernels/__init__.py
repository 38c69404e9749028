"""Triton kernels, one module per op: pynn.triton_kernels.<op>.

Every public function has the name and the argument order of a dispatcher op of namespace pynn_triton. Its operands come
validated; it makes them contiguous, allocates the results and launches. Launches switch fusion of a * b + c off
(enable_fp_fusion=False): what rounds twice on the CPU rounds twice here, so results are bit-identical.
"""
