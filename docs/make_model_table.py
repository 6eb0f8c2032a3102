"""Writes the tables of models in README.md and docs/models.md: `python docs/make_model_table.py`."""

import json
from pathlib import Path

from nfnet_keras.applications.registry import get_row, list_models
from nfnet_keras.checkpoints.manifest import published, shipped_words

README = Path(__file__).parents[1] / "README.md"
ALL_MODELS = Path(__file__).parent / "models.md"
COSTS = Path(__file__).parents[1] / "nfnet_keras" / "applications" / "costs.json"
BEGIN = "<!-- Made by docs/make_model_table.py. -->\n"
END = "<!-- End of what docs/make_model_table.py made. -->\n"
_HEAD = ("name", "parameters", "multiply-adds", "train / test size", "top-1, published", "weights")
_SOURCES = {"haiku": "the authors'", "timm": "timm's"}


def _cells(name: str, cost: dict[str, int]) -> tuple[str, ...]:
    row, weights = get_row(name), published(name)
    top1 = "–"
    if weights:
        sizes = {accuracy.size: accuracy.top1 for accuracy in weights.accuracy}
        top1 = f"{sizes.get(row.test_size, weights.accuracy[0].top1):.1f} %"
    return (
        f"`{name}`",
        f"{cost['parameters'] / 1e6:.1f} M",
        f"{cost['multiply_adds'] / 1e9:.2f} G",
        f"{row.train_size} / {row.test_size}",
        top1,
        _source(name),
    )


def _source(name: str) -> str:
    weights = published(name)
    sources = [_SOURCES[weights.format]] if weights else []
    return ", ".join([*sources, *(f'ours (`"{word}"`)' for word in shipped_words(name))]) or "none"


def _order(name: str) -> tuple:
    digits = "".join(character if character.isdigit() else " " for character in name).split()
    plain = "".join(character for character in name if not character.isdigit())
    families = ("nfnet_tiny", "nfnet_f", "nfnet_f_plus", "nf_regnet_b", "nf_resnet")
    return families.index(plain) if plain in families else len(families), plain, [int(number) for number in digits]


def named_in_the_readme() -> list[str]:
    """Returns the networks of the README's table: those with weights, but for timm's copies of the authors'."""
    models = [name for name in list_models() if published(name) or shipped_words(name)]
    return [name for name in models if not name.startswith("timm_dm_")]


def table(names: list[str]) -> str:
    """Returns a table of models, in Markdown."""
    costs = json.loads(COSTS.read_text(encoding="utf-8"))
    rows = [_HEAD, ("---",) * len(_HEAD), *(_cells(name, costs[name]) for name in sorted(names, key=_order))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def page(text: str, names: list[str]) -> str:
    """Returns a page with the table that belongs there."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{table(names)}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for path, names in ((README, named_in_the_readme()), (ALL_MODELS, list_models())):
        path.write_text(page(path.read_text(encoding="utf-8"), names), encoding="utf-8")
