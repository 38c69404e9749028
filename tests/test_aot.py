"""The ratchet of tests/aot: what it must catch, it catches. The compilation itself is `make aot`."""

from pathlib import Path

import pytest
from aot import built_cuda, jobs, measure, ratchet
from aot.__main__ import report
from aot.cases import CASES, cuda_promise
from aot.ratchet import Promise

NAME = "op.kernel fp32 | triton sm_90"
WIDE = Promise(exact=True, wide_loads=True, wide_stores=True)
VERSIONS = {"triton": "3.7.1"}
GOOD = {
    "registers": 40, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 1024, "loads": 6, "loads128": 2, "stores": 2,
    "stores128": 2, "fma": 76, "fusable": 0, "mma": 4, "wgmma": 4, "tcgen05": 4, "mfma": 4, "tma": 2, "cp_async": 8,
}  # fmt: skip


def judge(row, *, promise=WIDE, versions=VERSIONS, accepted=GOOD):
    rows = {} if row is None else {NAME: row}
    old = {} if accepted is None else {NAME: accepted}
    return ratchet.compare(rows, old, {NAME: promise}, versions, VERSIONS)


def status(verdict, tmp_path, monkeypatch, *, accept):
    """Exit status of the command, and whether it wrote ratchet.json."""
    path = tmp_path / "ratchet.json"
    monkeypatch.setattr("aot.__main__.RATCHET", path)
    monkeypatch.setattr("aot.__main__.ROOT", tmp_path)
    code = report(verdict, {"triton": ({NAME: GOOD}, VERSIONS)}, accept)
    return code, path.exists()


def test_equal_rows_pass():
    assert judge(GOOD) == ratchet.Verdict()


@pytest.mark.parametrize("value", ratchet.FEWER_IS_BETTER + ratchet.MORE_IS_BETTER)
def test_a_worse_value_fails_and_a_better_one_does_not(value):
    step = 1 if value in ratchet.FEWER_IS_BETTER else -1
    before = GOOD | {value: 5}
    worse, better = (before | {value: 5 + sign * step} for sign in (1, -1))
    verdict = judge(worse, promise=Promise(), accepted=before)
    assert verdict.worse == [f"{NAME}: {value} 5 -> {5 + step}"]
    verdict = judge(better, promise=Promise(), accepted=before)
    assert not verdict.worse
    assert verdict.notes == [f"{NAME}: better: {value} 5 -> {5 - step}"]


def test_a_count_that_disappears_counts_as_zero():
    gone = {key: n for key, n in GOOD.items() if key != "wgmma"}
    assert judge(gone).worse == [f"{NAME}: wgmma 4 -> 0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_bytes": 8}, "8 bytes of registers are spilled"),
        ({"fusable": 1}, "may be fused"),
        ({"loads128": 0}, "none of its 6 global loads has 16 bytes"),
        ({"stores128": 0}, "none of its 2 global stores has 16 bytes"),
    ],
)
def test_what_is_never_accepted(change, message, tmp_path, monkeypatch, capsys):
    """Also for a new kernel, with other compilers, and where the ratchet already holds the bad value."""
    bad = GOOD | change
    for verdict in (
        judge(bad),
        judge(bad, accepted=None),
        judge(bad, accepted=bad),
        judge(bad, versions={"triton": "4"}),
    ):
        assert len(verdict.broken) == 1
        assert message in verdict.broken[0]
        assert status(verdict, tmp_path, monkeypatch, accept=True) == (1, False)
    assert "never accepted" in capsys.readouterr().out
    assert not judge(GOOD | {"fusable": 1}, promise=Promise(), accepted=None).broken  # only promises are held


def test_instructions_that_a_kernel_must_contain():
    promise = Promise(contains=("wgmma", "tma"))
    assert not judge(GOOD, promise=promise).broken
    gone = {key: n for key, n in GOOD.items() if key != "wgmma"}
    assert judge(gone, promise=promise, accepted=None).broken == [f"{NAME}: contains no wgmma, expected some"]


def test_a_missing_kernel_fails():
    assert judge(None).worse == [f"{NAME}: is gone"]


def test_a_new_kernel_is_noted():
    verdict = judge(GOOD, accepted=None)
    assert not verdict.worse
    assert verdict.notes == ["op.kernel fp32: new for triton sm_90"]


def test_other_compilers_are_judged_on_spills_and_promises_only():
    verdict = judge(GOOD | {"registers": 99}, versions={"triton": "3.8.0"})
    assert not verdict.worse
    assert verdict.notes == ["other compilers (triton 3.7.1 -> 3.8.0): only spills and promises are judged"]


def test_worse_values_fail_until_accepted(tmp_path, monkeypatch, capsys):
    verdict = judge(GOOD | {"registers": 41})
    assert status(verdict, tmp_path, monkeypatch, accept=False) == (1, False)
    output = capsys.readouterr().out
    assert "registers 40 -> 41" in output
    assert "make aot ACCEPT=1" in output
    assert status(verdict, tmp_path, monkeypatch, accept=True) == (0, True)
    assert status(judge(GOOD), tmp_path, monkeypatch, accept=False)[0] == 0


def test_accepting_one_half_keeps_the_other(tmp_path, monkeypatch):
    """Without nvcc only Triton is compiled: the CUDA rows stay."""
    path, cuda = tmp_path / "ratchet.json", "op.kernel<float> | cuda sm_80"
    ratchet.write(path, {cuda: GOOD, "op.old | triton sm_90": GOOD}, {"nvcc": "13.0", "triton": "3.6.0"})
    assert status(ratchet.Verdict(), tmp_path, monkeypatch, accept=True) == (0, True)
    assert ratchet.read(path) == ({cuda: GOOD, NAME: GOOD}, {"nvcc": "13.0", **VERSIONS})
    assert len([line for line in path.read_text().splitlines() if " | " in line]) == 2  # one line per row


def test_committed_rows_keep_their_promises():
    rows, versions = ratchet.read(built_cuda.ROOT / "tests/aot/ratchet.json")
    assert {"triton", "nvcc"} <= versions.keys()
    assert {job.half for job in jobs.jobs_of("nvcc", every=1)} == {"triton", "cuda"}
    for job in jobs.jobs_of("nvcc", every=1):
        target = job.target if job.half == "triton" else f"sm_{job.target}"
        module = f"{job.source.stem}." if job.source else ""
        assert any(name.startswith(module) and name.endswith(f" | {job.half} {target}") for name in rows), job
    exact = {module: Promise(exact=all(case.promise.exact for case in cases())) for module, cases in CASES.items()}
    for name, row in rows.items():
        module, _, rest = name.partition(".")
        kernel, _, target = rest.rpartition(" | ")
        promise = cuda_promise(kernel) if target.startswith("cuda") else exact[module]
        assert not ratchet.broken_promises(name, row, promise)


def test_counts_in_ptx():
    ptx = """
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    @%p1 ld.global.L1::evict_last.v2.b64 { %rd2, %rd3 }, [ %rd1 ];
    ld.global.b32 %r5, [%rd4];
    st.global.v2.b32 [%rd1], {%r1, %r2};
    fma.rn.f32 %f1, %f2, %f3, %f4;
    mul.rn.f32 %f1, %f2, %f3;
    mul.f32 %f1, %f2, %f3;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16
    """
    found = {"loads": 3, "loads128": 2, "stores": 1, "stores128": 0, "fma": 1, "fusable": 1, "wgmma": 1}
    assert measure.of_ptx(ptx) == found


def test_counts_in_sass_and_amd_assembly():
    sass = "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]\nLDG.E R1\n@P0 STG.E.128 desc[UR4][R2.64], R4\nSTG.E.U16 R1"
    assert measure.of_sass(sass) == {"loads": 2, "loads128": 1, "stores": 2, "stores128": 1}
    assembly = """
    buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
    global_load_dword v0, v1, s[0:1]
    global_store_dwordx4 v[0:1], v[2:5], off
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 0
    .vgpr_count:     25
    .vgpr_spill_count: 2
    """
    found = measure.of_amdgcn(assembly)
    assert found["registers"] == 25
    assert found["spill_bytes"] == 8
    assert (found["loads"], found["loads128"], found["stores"], found["stores128"]) == (2, 1, 1, 1)
    assembly = assembly.replace("sgpr_spill_count: 0", "sgpr_spill_count: 3")  # to lanes of vector registers,
    assert measure.of_amdgcn(assembly)["spill_bytes"] == 8
    assembly = assembly.replace("fixed_size: 0", "fixed_size: 16")  # or to memory
    assert measure.of_amdgcn(assembly)["spill_bytes"] == 20


def test_spills_in_the_log_of_ptxas():
    log = """ptxas info    : Compiling entry function '_Z1f' for 'sm_90a'
ptxas info    : Function properties for _Z1f
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers
ptxas info    : Function properties for _Z1g
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    assert measure.spills(log) == {"_Z1f": 20, "_Z1g": 0}


def test_names_and_promises_of_cuda_kernels():
    mangled = "_ZN4pynn4cuda12_GLOBAL__N_118elementwise_kernelINS1_8NormalOpIfEEEEvT_l"
    assert built_cuda.short_names([mangled]) == {mangled: "elementwise_kernel<NormalOp<float>>"}
    assert cuda_promise("elementwise_kernel<NormalOp<float>>") == Promise(exact=True, wide_stores=True)
    assert cuda_promise("elementwise_kernel<ForwardJumpOp<float>>") == WIDE
    assert cuda_promise("loss_rows_kernel<float>") == Promise(exact=True)


def test_what_was_not_built_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(built_cuda, "ROOT", tmp_path)
    kept = tmp_path / "build/ninja/cuda/cuda_op.o.kept"
    kept.mkdir(parents=True)
    for name in ("op.compute_80.sm_80.cubin", "op.compute_80.sm_86.cubin", "op.compute_80.ptx", "op.compute_90a.cubin"):
        (kept / name).touch()
    source = Path("csrc/cuda/op.cu")
    assert built_cuda.find_build(source, "86") == (kept / "op.compute_80.sm_86.cubin", kept / "op.compute_80.ptx")
    assert built_cuda.find_build(source, "90a") == (kept / "op.compute_90a.cubin", kept / "op.compute_90a.ptx")
    with pytest.raises(RuntimeError, match="not built for sm_100: make build"):
        built_cuda.find_build(source, "100")
