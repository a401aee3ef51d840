"""Static figures of whole losses, ours and others': as they compile now, as they are committed, as the page says."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

pytest.importorskip("triton")

from contrastile.bench.static import bounds, rival_launches, rivals
from contrastile.bench.static.disassembly import parse_sass
from contrastile.bench.static.instructions import Work
from contrastile.bench.static.launches import bound, compiled
from contrastile.bench.static.matrix import Configuration
from contrastile.bench.static.rates import LIMITS, matrix_rate, rates_of
from contrastile.bench.static.rival_launches import Cache, Loop, Product
from support import INTERPRETING

PAGE = (Path(__file__).parents[1] / "docs" / "rival-kernels.md").read_text()
TOLERANCE = 0.03
needs_compiler = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted in this process, not compiled")


def committed(target, depth, loss):
    wanted = (target, str(depth), loss)
    return [row for row in rivals.read_rows() if tuple(row[name] for name in rivals.KEY[:3]) == wanted]


def assert_same_figures(now, before):
    assert [row["part"] for row in now] == [row["part"] for row in before]
    for row, known in zip(now, before, strict=True):
        for name in ("products", *rivals.FIGURES):
            figure = pytest.approx(float(known[name]), rel=TOLERANCE, abs=0.01)
            assert float(row[name]) == figure, f"{name} of {known['part']}"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("loss", rivals.AIMS)
def test_our_figures_are_those_committed(loss):
    assert_same_figures(rivals.our_rows(loss, "sm_90", 512), committed("sm_90", 512, loss))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("loss", rivals.RIVALS)
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_others_figures_are_those_committed(loss, target):
    before = committed(target, 1024, loss)
    if rivals.RIVALS[loss].version != before[0]["version"]:
        pytest.skip(f"{rivals.RIVALS[loss].package} {before[0]['version']} is not installed")
    assert_same_figures(rivals.others_rows(loss, target, 1024), before)


def test_the_table_has_every_loss_on_every_target():
    found = {(row["target"], int(row["D"]), row["loss"]) for row in rivals.wholes(rivals.read_rows())}
    losses = (*rivals.AIMS, *rivals.RIVALS)
    assert found == {(t, depth, loss) for t in rivals.CHIPS for depth in rivals.DEPTHS for loss in losses}


def test_the_page_has_the_committed_tables():
    rows = rivals.read_rows()
    lines = PAGE.splitlines()
    assert [line for line in rivals.markdown(rivals.wholes(rows)) if line not in lines] == []
    assert [line for line in rivals.markdown(rivals.comparisons(rows)) if line not in lines] == []


def test_what_the_page_says_holds_in_the_table():
    rows = rivals.read_rows()
    ratios = rivals.comparisons(rows)
    assert all(row["matrix holds"] == "yes" for row in ratios)
    for rival, expected in (("memeff", "0.17 to 0.69 of memeff's"), ("Inf-CL", "0.04 to 0.10 of Inf-CL's")):
        shares = [row["busiest"] for row in ratios if row["by"] == rival]
        least, _, most = expected.split()[:3]
        assert (min(shares), max(shares)) == (least, most)
        assert expected in PAGE
    less = {(row["by"], row["D"], row["ours"], row["target"]): row["less DRAM"] for row in ratios}
    shallow = {key[1:]: answer for key, answer in less.items() if key[1] == "512" and answer != "no"}
    assert shallow == {("512", "symmetric", target): "depends" for target in ("sm_80", "sm_90")}
    for loss in rivals.AIMS:
        deep = {rival: [less[rival, "1024", loss, target] for target in rivals.CHIPS] for rival in rivals.RIVALS}
        assert deep == {"memeff": ["yes", "yes", "yes"], "Inf-CL": ["yes", "yes", "no"]}
    unfit = {(row["loss"], row["target"], row["D"], int(row["shared_bytes"])) for row in rows if row["blocks"] == "0"}
    assert unfit == {("memeff", "sm_100", "512", 262432)}
    assert "262,432 bytes" in PAGE
    known = rivals.wholes(committed("sm_80", 512, "memeff"))[0]
    assert f"its bound there is {known['busiest']}." in PAGE
    assert f"{LIMITS['sm_100'].shared_a_block:,}" in PAGE


def test_no_kernel_of_ours_waits_for_dram():
    shares = {}
    for row in rivals.read_rows():
        if row["loss"] in rivals.AIMS:
            chip = rivals.CHIPS[row["target"]]
            rates = rates_of(row["target"])
            a_ms = rates.dram * rates.multiprocessors * chip.gigahertz * 1e6
            shares[row["target"], row["D"], row["part"]] = float(row["dram_GB"]) * 1e9 / a_ms / float(row["busiest"])
    most = max(shares, key=lambda key: shares[key])
    assert most == ("sm_90", "512", "products")
    assert f"{shares[most]:.2f} of the bound at most" in PAGE


@needs_compiler
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_others_are_counted_as_ours_are(target):
    configuration = Configuration(target, "statistics", "bf16", 512)
    plan, kernel, expected = configuration.plan, compiled(configuration), bound(configuration)
    product = Product(plan.block_rows, plan.block_cols, plan.block_depth)
    loop = Loop(512 // plan.block_depth, (product,))
    loops = [loop] if expected.rounds else []  # the compiler may have unrolled it
    work = rival_launches.work_of_warp(parse_sass(kernel.assembly), loops) * kernel.num_warps
    if target == "sm_100":
        work += product.tcgen05() * loop.rounds
    found = bounds.cycles_of(target, work, matrix_rate(target, "bf16", "ieee"))
    for pipe in bounds.PIPES:
        if pipe == "fill" and plan.descriptors:
            continue  # sizes of TMA copies are in no instruction
        assert found[pipe] == pytest.approx(expected.cycles[pipe], rel=1e-6), pipe


def test_loops_within_loops_run_as_often_as_they_are_described():
    product = "HMMA.16816.F32 R0, R1, R2, R0"
    tf32 = "HMMA.1688.F32.TF32 R0, R1, R2, R0"
    lines = [
        *("S2R R0, SR_TID.X", ".L_x_0:", "MUFU.EX2 R3, R3", ".L_x_1:", product, "@P0 BRA `(.L_x_1)"),
        *("@P2 BRA `(.L_x_3)", ".L_x_2:", tf32, "@P0 BRA `(.L_x_2)", ".L_x_3:", "@P1 BRA `(.L_x_0)"),
        *("STG.E R3, [R4]", "EXIT"),
    ]
    text = "\n".join(
        line if line.startswith(".L") else f"        /*{n:04x}*/  {line} ;" for n, line in enumerate(lines)
    )
    loops = [Loop(10, inner=(Loop(3), Loop(5)))]
    work = rival_launches.work_of_warp(parse_sass(text), loops)
    assert work.matrix == 10 * (3 * 2 * 16 * 8 * 16 + 5 * 2 * 2 * 16 * 8 * 8)  # flop of tf32 twice
    assert (work.exponentials, work.stored) == (10 * 32, 4 * 32)
    with pytest.raises(RuntimeError, match="1 loops have matrix instructions: expected 2"):
        rival_launches.work_of_warp(parse_sass(text), [Loop(1), Loop(1)])


def test_tcgen05_reads_its_operands_by_instruction():
    assert Product(128, 512, 32).tcgen05() == Work(matrix=2 * 128 * 512 * 32, shared=4 * (128 + 256) * 32)
    assert Product(64, 64, 16, is_tf32=True).tcgen05() == Work(matrix=4 * 64 * 64 * 16, shared=2 * 128 * 32)
    assert Product(64, 64, 16, left_is_near=True).tcgen05().shared == 64 * 32


@pytest.mark.parametrize(("keeps", "moved"), [(False, 400), (True, 190)])
def test_what_does_not_fit_the_cache_is_read_again(keeps, moved):
    cache = Cache(70, keeps)
    assert cache.again(60, walks=4) == 60
    assert cache.again(100, walks=4) == pytest.approx(moved)
    assert cache.again(50, walks=4, written=20) == 70


def test_missing_packages_are_named_and_our_rows_stay(capsys, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(rival_launches, "version", missing)
    monkeypatch.setattr(rivals, "our_rows", lambda loss, target, depth: committed(target, depth, loss))
    assert rivals.main(["--targets", "sm_90"]) == 0
    printed = capsys.readouterr().out
    assert "| sm_90 | 512 | symmetric |" in printed
    assert "memeff is not installed: pip install --no-deps memeff" in printed
    assert "inf-cl is not installed" in printed
    with pytest.raises(SystemExit):
        rivals.main(["--targets", "sm_90", "--write"])
