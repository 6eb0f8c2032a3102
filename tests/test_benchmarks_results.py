"""What the benchmarks make of their measurements: medians, ratios, shares, tables."""

from benchmarks import results
from benchmarks.results import Requirement, Result


def cells(table, side):
    row = next(line for line in table.splitlines() if line.startswith(f"| {side} "))
    header = next(line for line in table.splitlines() if line.startswith("| side"))
    return dict(zip(header.split(" | "), row.split(" | "), strict=True))


def test_report_has_medians_ratios_and_shares():
    table = results.report(
        [
            Result("matrix product 2 x 2", "slow, float32", "s", [4.0], 16e9),
            Result("matrix product 2 x 2", "quick, float32", "s", [1.0, 9.0, 2.0], 16e9),
            Result("case", "peer", "s", [6.0, 3.0, 5.0], 8e9, memory=20.0),
            Result("case", "ours, slow", "s", [4.0], 8e9),
            Result("case", "ours", "s", [2.0], 8e9, "a remark"),
            Result("case", "peer, bfloat16", "s", [1.0]),
            Result("case", "ours, no AGC", "s", [1.0]),
            Result("case", "peer, no AGC", "s", [1.5]),
        ],
        [],
    )
    peer = cells(table.split("### case")[1], "peer")
    assert (peer["median, s"], peer["range"], peer["times ours"]) == ("5", "3 to 6", "2.50")
    # 1.6 GFLOP/s of the 8 that the quicker library reached in the median.
    assert (peer["GFLOP/s"], peer["share of the matrix rate"], peer["peak memory, MiB"]) == ("2", "20%", "20")
    case = table.split("### case")[1]
    assert "2.00" in cells(case, "ours, slow")["times ours"]
    assert cells(case, "peer, no AGC")["times ours"] == "1.50"
    assert cells(case, "peer, bfloat16")["times ours"] == "", "bfloat16 has no side of ours to be held against"
    assert "a remark" in case


def test_report_tells_what_does_not_hold_and_what_did_not_run():
    requirements = [Requirement("floor", 1.2, 1.15), Requirement("ceiling", 0.06, 0.05, at_most=True)]
    table = results.report([Result("not run", "peer", "", [], note="no wheel")], requirements)
    assert "| floor | 1.2 | >= 1.15 | yes |" in table
    assert "| ceiling | 0.06 | <= 0.05 | NO |" in table
    assert "- not run: peer: no wheel" in table


def test_memory_is_held_against_memory_of_the_same_kind():
    table = results.report(
        [
            Result("case", "ours: whole", "MiB", [200.0], note="a last column"),
            Result("case", "ours, remat: whole", "MiB", [100.0]),
            Result("case", "ours: above", "MiB", [50.0]),
            Result("case", "peer: whole", "MiB", [300.0]),
            Result("case", "peer: above", "MiB", [100.0]),
            Result("case", "peer, checkpointing: whole", "MiB", [150.0]),
        ],
        [],
    )
    found = {each: cells(table, each)["times ours"] for each in ("peer: whole", "peer: above")}
    assert found == {"peer: whole": "1.50", "peer: above": "2.00"}
    assert cells(table, "peer, checkpointing: whole")["times ours"] == "1.50"


def test_a_share_is_of_the_rate_in_the_same_rounds():
    product = Result("matrix product 2 x 2", "a, float32", "s", [1.0], 16e9)
    beside = Result("case", "ours", "s", [1.0], 4e9, "a last column", rates={"float32": 8e9})
    later = Result("case", "peer", "s", [1.0], 4e9)
    case = results.report([product, beside, later], []).split("### case")[1]
    assert cells(case, "ours")["share of the matrix rate"] == "50%"
    assert cells(case, "peer")["share of the matrix rate"] == "25%"


def test_values_of_the_same_side_and_case_are_put_together():
    found = results.merged([Result("c", "a", "s", [1.0]), Result("c", "b", "s", [5.0]), Result("c", "a", "s", [3.0])])
    assert [(each.side, each.values) for each in found] == [("a", [1.0, 3.0]), ("b", [5.0])]
