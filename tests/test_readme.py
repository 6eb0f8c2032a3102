"""What README.md and the pages in docs/ say is true as far as a program can tell: code, commands, tables, links."""

import configparser
import importlib.util
import json
import re
import shlex
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import nfnet_keras as nfk
from nfnet_keras.checkpoints import save_checkpoint
from nfnet_keras.cli.main import main
from nfnet_keras.complexity import parameters, without_weights

ROOT = Path(__file__).parents[1]
COSTS = ROOT / "nfnet_keras" / "applications" / "costs.json"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
EVERYTHING = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(ROOT / name for name in ("weights/README.md", "benchmarks/tried.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def program(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


# Tables


def test_tables_of_models():
    made = program(ROOT / "docs" / "make_model_table.py")
    models = PAGES["models.md"]
    assert made.page(README, made.named_in_the_readme()) == README
    assert made.page(models, nfk.list_models()) == models
    assert all(f"| `{name}` |" in models for name in nfk.list_models())
    assert f"[all {len(nfk.list_models())}](docs/models.md)" in README
    published = [name for name in nfk.list_models(pretrained=True) if "dm_nfnet" not in name]
    assert all(f"| `{name}` |" in README for name in published)


def test_costs_name_every_model():
    assert list(json.loads(COSTS.read_text(encoding="utf-8"))) == nfk.list_models()


SMALL = ("nfnet_tiny", "nfnet_f0", "nf_regnet_b0", "nf_resnet50", "timm_test_nfnet", "timm_eca_nfnet_l0")


@pytest.mark.parametrize(
    "name", [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in nfk.list_models()]
)
def test_costs(name):
    with without_weights():
        model = nfk.create_model(name, weights=None)
        counted = {"parameters": parameters(model), "multiply_adds": nfk.multiply_adds(model)}
    assert counted == json.loads(COSTS.read_text(encoding="utf-8"))[name]


def comparison() -> list[list[str]]:
    """The rows of the table beside the peers: feature, here, authors, timm, kecam, what proves it."""
    section = README.partition("\n## Beside others\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_tick_of_ours_names_what_proves_it():
    """A test that there is, with tests in it, or the table of measurements; the links are looked up below."""
    rows = comparison()
    assert len(rows) > 15
    assert {len(row) for row in rows} == {6}
    for feature, here, *peers, proof in rows:
        assert bool(here) == bool(proof), feature
        assert here or any(peers), feature
        for place in re.findall(r"\]\(([^)]*)\)", proof):
            text = (ROOT / place).read_text(encoding="utf-8")
            assert place == "docs/benchmarks/table.md" or "def test_" in text, place


def test_the_speed_table_is_in_bold_where_we_are_fastest():
    section = README.partition("\n## Speed\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    for _, *cells in rows[2:]:
        times = [float(found[0]) for cell in cells if (found := re.search(r"[\d.]+", cell))]
        assert cells[0].startswith("**") == (times[0] == min(times))


# The front page


def rendered_lines(text: str) -> int:
    """Lines on a screen: text is 100 characters wide, a line 24 pixels high, the picture in the ratio of the file."""
    [(path, width)] = re.findall(r'<img src="([^"]*)" width="(\d+)"[^>]*>', text)
    with Image.open(ROOT / path) as picture:
        lines = round(int(width) * picture.height / picture.width / 24)
    text = re.sub(r"<!--.*?-->|<img[^>]*>", "", text)
    text = re.sub(r"^\[?!\[.*shields.io.*\n(?=\[?!\[)", "", text, flags=re.MULTILINE)  # badges stand in one row
    for part in re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE):
        if part.startswith("```"):
            lines += part.count("\n")  # fences: a margin
        else:
            for paragraph in part.strip().split("\n\n"):
                shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", paragraph)
                lines += 1 + len(textwrap.wrap(shown, 100))
    return lines


def test_the_front_page_is_short():
    before = README.partition("\n| ")[0]
    for section in ("## Install", "## Two commands", "## Transfer learning"):
        assert section in before
    assert "make train" in before
    assert "make test" in before
    assert before.count("<img ") + before.count("![") - before.count("shields.io") == 1, "one picture"
    assert rendered_lines(before) <= 80, "two screens"


def test_the_order_of_the_front_page():
    order = re.findall(r"^## (.*)", README, re.MULTILINE)
    wanted = [
        "Install",
        "Two commands",
        "Transfer learning",
        "Models",
        "Beside others",
        "Speed",
        "Not verified",
        "More",
    ]
    assert [section for section in order if section in wanted] == wanted
    assert "CITATION.cff" in README


def test_badges_are_true():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    badges = re.findall(r"!\[([^]]*)\]\(https://img\.shields\.io/badge/([^)]*)\)", README)
    assert len(badges) == README.count("shields.io") == 3
    assert badges[0][1] == f"python-{setup['options']['python_requires'].removeprefix('>=')}%2B-blue"
    assert {"jax", "torch"} <= set(setup["options.extras_require"])
    assert "tensorflow" in setup["options"]["install_requires"]
    assert badges[1][1] == "keras_3-tensorflow_%7C_jax_%7C_pytorch-blue"
    assert badges[2][1] == f"licence-{setup['metadata']['license'].replace('-', '--')}-blue"


def test_citation():
    import yaml

    text = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(text), "what the format asks for"
    assert text["version"] == nfk.__version__
    assert text["authors"] == [{"name": "The nfnet-keras authors"}]
    assert {reference["url"] for reference in text["references"]} <= set(re.findall(r"\((https://arxiv.*?)\)", README))


# Links


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"(?:\]\(|src=\")([^)\s\"]+)[)\"]", text):
        if link.startswith(("https://", "http://")):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), f"{link} in {path.name}"
        assert target.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{link} in {path.name}"


def test_every_page_is_linked_from_the_readme():
    linked = {page for page in PAGES if f"(docs/{page})" in README}
    assert linked == set(PAGES)


# Code


def test_transfer_learning_example_runs(monkeypatch, tmp_path):
    """As it stands, but with the small network, its own weights, and ten images."""
    [example] = blocks(README, "python")
    assert len([line for line in example.splitlines() if line]) <= 8
    weights = tmp_path / "pretrained.weights.h5"
    nfk.NFNetTiny(weights=None).save_weights(weights)
    monkeypatch.setattr(nfk, "NFNetF0", lambda weights, classes: nfk.NFNetTiny(weights=path, classes=classes))
    path, labels = weights, keras.utils.to_categorical([0, 1] * 4, 5)
    images = keras.random.uniform((8, 32, 32, 3), 0, 255)
    with pytest.warns(UserWarning, match="classifier"):
        exec(example, {"images": keras.ops.convert_to_numpy(images), "labels": labels})


def small(code: str) -> str:
    """The same with images of the small network's size."""
    return re.sub(r"\b(256, 256|192, 192)\b", "32, 32", code)


def stand_in(*, weights="imagenet", **options):
    """The small network in the place of F0; nothing is downloaded."""
    assert weights in ("imagenet", None)
    return nfk.NFNetTiny(weights=None, **options)


SLOW_PAGES = ("inference.md",)
WITH_CODE = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_PAGES))
    for name, text in PAGES.items()
    if blocks(text, "python")
]


@pytest.mark.parametrize("name", WITH_CODE)
@pytest.mark.filterwarnings("ignore:.*classifier")
def test_code_of_the_pages_runs(name, monkeypatch, tmp_path):
    """A page's blocks one after the other, each with what those before it left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nfk, "NFNetF0", stand_in)
    space = {}
    for block in blocks(PAGES[name], "python"):
        exec(compile(small(block), name, "exec"), space)


def test_what_the_pages_code_leaves(monkeypatch, tmp_path):
    """That the blocks do what the words beside them say, on the page about clipping."""
    monkeypatch.setattr(nfk, "NFNetF0", stand_in)
    space = {}
    first, second = blocks(PAGES["clipping.md"], "python")
    exec(small(first), space)
    assert isinstance(space["model"], nfk.NormalizerFreeModel)
    assert space["model"].output_shape == (None, 5)
    exec(small(second), space)
    assert nfk.optimizers.clips_adaptively(space["model"].optimizer)


# Commands


def commands() -> list[str]:
    """Every `nfnet ...` in a block of README.md and of the pages."""
    found = [block for text in (README, *PAGES.values()) for block in blocks(text, "")]
    return [line for block in found for line in block.splitlines() if line.startswith("nfnet ")]


def arguments(line: str) -> list[str]:
    """What to call; a run is planned and not done, and the network that predicts is one that needs no download."""
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "train" and "--dry-run" not in words:
        words.append("--dry-run")
    if words[0] == "predict" and "--model" not in words:
        words += ["--model", "RUN"]
    return words


def needs_files(line: str) -> bool:
    return any(word in line for word in ("RUN", ".jpg", "FOLDER", ".npz"))


def test_there_are_commands_of_every_kind():
    from nfnet_keras.cli.main import COMMANDS

    assert {line.split()[1] for line in commands()} == set(COMMANDS)


def test_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in commands() if not needs_files(line)]
    assert len(lines) >= 4
    for line in lines:
        assert main(arguments(line)) == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.slow
def test_commands_with_files_run(tmp_path, monkeypatch, capsys):
    """With a folder of images, a run of one epoch on it, and a file as the authors write theirs."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    places = [f"FOLDER/{kind}/{number}.jpg" for kind in "ab" for number in range(12)]
    for place in (*places, "cat.jpg", "photographs/dog.jpg"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), np.uint8)).save(place)
    run = ["--data=FOLDER", "--model=nfnet_tiny", "--epochs=1", "--batch-size=8", "--image-size=32", "--out=RUN"]
    assert main(["train", *run]) == 0
    save_checkpoint(nfk.NFNetTiny(weights=None), "F0_haiku.npz", "haiku")
    for line in filter(needs_files, commands()):
        assert main(arguments(line)) == 0, f"{line}\n{capsys.readouterr().err}"
    assert safetensors.numpy.load_file("f0.safetensors")
