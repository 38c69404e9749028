"""python -m pynn.info knows every public op."""

import pynn
from pynn import backends, info


def test_every_public_op_has_a_row_for_every_backend():
    rows = info.availability()
    ops = {name for name in pynn.ops.__all__ if name[0].islower()}
    assert {(op, backend) for op, backend, _ in rows} == {(op, b) for op in ops for b in backends.unavailable}
    assert all(reason == "" for _, backend, reason in rows if backend == "cpu")


def test_the_self_check_passes(capsys):
    assert info.main() == 0
    assert "multi_head_attention" in capsys.readouterr().out
