"""The interpreter's own tests. tests/test_triton_interpreter.py runs the check_*.py files in child processes."""
