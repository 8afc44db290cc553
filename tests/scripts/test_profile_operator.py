"""The profile's command: everything that a call does is in its table, and its products are counted right."""

import pytest


@pytest.fixture
def profile_operator(imported):
    return imported("profile_operator")


def test_the_rows_of_each_table_sum_up(profile_operator, capsys):
    profile_operator.main(["--length", "300", "--repeats", "1", "--rows", "3"])
    first, *tables = capsys.readouterr().out.split("\n\n")
    assert "N = 300; a large matrix product runs at" in first
    for table, title in zip(tables, ("forward", "forward+backward"), strict=True):
        head, _, *rows = table.strip().splitlines()
        assert head.startswith(f"| {title}: operation |")
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        assert cells[-1][0] == "all"
        assert len(cells) == 5
        for column, slack in ((2, 2), (3, 0.3)):  # calls and milliseconds, as they are rounded
            *parts, whole = (float(row[column]) for row in cells)
            assert abs(sum(parts) - whole) <= slack


def test_products_are_counted(profile_operator):
    found = profile_operator.profile("forward", 512, repeats=1)
    counted = {name: sum(e[2] for (n, _), e in found.items() if n == name) for name in {n for n, _ in found}}
    heads, dim, features, near = 8, 64, 64, 136
    sums = 2 * 2 * features * (dim + 1)  # of a token, read or added
    assert counted["_scaled_dot_product_flash_attention_for_cpu"] == 512 * heads * 2 * 2 * near * dim
    assert counted["bmm"] == 512 * heads * (2 * 2 * features * dim + sums)
    assert counted["baddbmm_"] == 512 * heads * sums
    assert counted["exp2"] == 0


def test_the_share_of_the_choice_of_kept_keys(profile_operator, capsys):
    profile_operator.main(["--length", "600", "--repeats", "1", "--rows", "3", "--kept-keys", "16"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "choosing which keys are kept" in line]
    shares = [float(line.split("takes ")[1].split("%")[0]) for line in lines]
    assert len(shares) == 2  # of each pass
    assert all(0 < share < 100 for share in shares)
