"""Prints what a network is made of: its stages with their output sizes, parameters and multiply-adds of one image.

MODEL is a name that `nfnet list` knows, a .keras file, or the folder of a run of `nfnet train`. A network by name is
laid out without its weights, so the largest takes seconds. Multiply-adds are those of convolutions and matrix products,
as the papers count them. Networks of other origin are listed by their layers.

With --signal it computes, and prints how the signal propagates: means and variances of the channels by depth, for
images of noise (mean 0, variance 1). A network by name is at its initialisation, but for skip gains of 1 in place of 0.
"""

import dataclasses
import json
import math
import re
import sys
import warnings
from collections.abc import Iterable, Sequence

from absl import flags

from nfnet_keras.cli.opening import load, model_file, only_model
from nfnet_keras.cli.pictures import picture_path, write_picture

ARGUMENTS = "MODEL"

_SECTIONS = re.compile(r"(?P<stem>stem)_|(?P<stage>stage\d+)_(?P<block>block\d+)_|(?P<head>final_|predictions$)")
_COLUMNS = ("stage", "blocks", "output", "stride", "parameters", "share", "multiply-adds", "share")


def define_flags() -> flags.FlagValues:
    """Returns the flags of `nfnet inspect`."""
    values = flags.FlagValues()
    options = {"flag_values": values}
    flags.DEFINE_integer("image_size", None, "side of the image in pixels; without it, the network's own", **options)
    flags.DEFINE_boolean("json", False, "print JSON", **options)
    flags.DEFINE_boolean("layers", False, "list every layer that has parameters or multiply-adds", **options)
    flags.DEFINE_boolean("signal", False, "measure how the signal propagates, and print that instead", **options)
    flags.DEFINE_string("picture", None, "with --signal: the file of a picture to write, such as signal.png", **options)
    flags.DEFINE_float(
        "skip_gain",
        None,
        "with --signal: what to take the learnt factors at the ends of the residual branches for; without it, 1 for a "
        "network by name, where they start at 0 and every block would be its shortcut, and a saved model's own",
        **options,
    )
    flags.DEFINE_integer("images", 8, "with --signal: how many images of noise", lower_bound=1, **options)
    flags.DEFINE_integer("seed", 0, "with --signal: seed of the images and of a network by name", **options)
    for name in ("image_size", "skip_gain"):
        flags.DEFINE_alias(name.replace("_", "-"), name, flag_values=values)
    return values


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Runs `nfnet inspect` and returns its exit status."""
    name = only_model(arguments)
    if values.image_size is not None and values.image_size < 1:
        raise ValueError(f"--image-size must be at least 1, not {values.image_size}")
    if values.signal:
        return _signal(name, values)
    for flag in ("picture", "skip_gain"):
        if getattr(values, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} goes with --signal")
    report = _report(name, values.image_size)
    for text in report["notes"]:
        print(f"nfnet inspect: note: {text}", file=sys.stderr)
    if values.json:
        if not values.layers:
            del report["layers"]
        print(json.dumps(report, indent=2))
    else:
        print(_text(report, values.layers))
    return 0


def _signal(name: str, values: flags.FlagValues) -> int:
    import keras
    import numpy as np

    from nfnet_keras import create_model, signal_propagation

    if values.layers:
        raise ValueError("--layers does not go with --signal")
    picture = None if values.picture is None else picture_path(values.picture, "--picture")
    path = model_file(name, "only whole models can be inspected")
    gain = values.skip_gain
    if path is None:
        size = {} if values.image_size is None else {"input_shape": (values.image_size, values.image_size, 3)}
        keras.utils.set_random_seed(values.seed)
        model, state, gain = (
            create_model(name, weights=None, **size),
            "at initialisation",
            1.0 if gain is None else gain,
        )
    else:
        model, state = load(path), "as saved"
    shapes = _input_shapes(model, values.image_size)
    rng = np.random.default_rng(values.seed)
    images = [rng.standard_normal((values.images, *shape), dtype="float32") for shape in shapes]
    report = signal_propagation(model, images if len(images) > 1 else images[0], skip_gain=gain, batch_size=8)
    about = f"{state}, {values.images} images of noise, {_shape(shapes)}, seed {values.seed}"
    if picture is not None:
        changed = f"; {report.note}" if report.note else ""
        write_picture(report.plot(title=f"{report.network}, {about}{changed}"), picture)
    if values.json:
        settings = {"state": state, "images": values.images, "seed": values.seed, "skip_gain": gain}
        rows = [{key: _finite(value) for key, value in dataclasses.asdict(row).items()} for row in report.rows]
        sizes = list(map(list, shapes))
        told = {"model": report.network, "source": path or name, "input_shape": sizes[0] if len(sizes) == 1 else sizes}
        print(json.dumps({**told, **settings, "rows": rows}, indent=2))
    else:
        print(f"{report.network}: {about}")
        print(report)
    return 0


def _finite(value):
    """JSON has no infinity, which the variance of a network without normalisation can reach."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report(name: str, image_size: int | None) -> dict:
    from nfnet_keras import create_model
    from nfnet_keras.complexity import without_weights

    path = model_file(name, "only whole models can be inspected")
    if path is not None:
        return _describe(load(path), path, image_size)
    size = {} if image_size is None else {"input_shape": (image_size, image_size, 3)}
    with without_weights():
        return _describe(create_model(name, weights=None, **size), name, image_size)


def _describe(model, source: str, image_size: int | None) -> dict:
    from nfnet_keras.complexity import parameters, trace

    shapes = _input_shapes(model, image_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        costs = trace(model, shapes)
    rows, seen = [], set()
    for cost in costs:
        # A shared layer is called twice and has its parameters once; an operation has none.
        new = id(cost.layer) not in seen and hasattr(cost.layer, "count_params")
        seen.add(id(cost.layer))
        own = cost.layer.count_params() if new else 0
        rows.append(_row(cost.name, cost.output_shape, parameters=own, multiply_adds=cost.multiply_adds))
    totals = {"parameters": model.count_params(), "multiply_adds": sum(row["multiply_adds"] for row in rows)}
    layers = _merged((row["name"], row) for row in rows if row["parameters"] or row["multiply_adds"])
    stages = _stages(rows, shapes[0]) or _merged((row["name"].partition("/")[0], row) for row in layers)
    for row in (*stages, *layers):
        for key, total in totals.items():
            row[f"{key}_share"] = round(row[key] / total, 6) if total else 0.0
    return {
        "model": model.name,
        "source": source,
        "input_shape": list(shapes[0]) if len(shapes) == 1 else [list(shape) for shape in shapes],
        "output_shape": rows[-1]["output_shape"] if rows and len(model.outputs) == 1 else None,
        **totals,
        "trainable_parameters": parameters(model),
        "metadata": getattr(model, "metadata", None) or {},
        "stages": stages,
        "layers": layers,
        "notes": [str(item.message) for item in caught if issubclass(item.category, UserWarning)],
    }


def _row(name: str, output_shape: Sequence, **counts: int) -> dict:
    return {"name": name, "output_shape": list(output_shape), **counts}


def _input_shapes(model, image_size: int | None) -> list[tuple]:
    """Shapes of the inputs, an image's brought to `image_size`, or to the model's own where it leaves that open."""
    import keras

    try:
        shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"the model {model.name!r} does not say what input it takes, so it cannot be inspected"
        ) from None
    if len(shapes) != 1 or len(shapes[0]) != 3:
        if image_size is not None:
            raise ValueError(f"--image-size is for networks that take one image; this one takes {shapes}")
        return shapes
    if image_size is None and None in shapes[0]:
        image_size = (getattr(model, "metadata", None) or {}).get("image_size")
        if image_size is None:
            raise ValueError("the network takes images of any size; give one with --image-size")
    if image_size is None:
        return shapes
    first = keras.config.image_data_format() == "channels_first"
    channels = shapes[0][0 if first else -1]
    return [(channels, image_size, image_size) if first else (image_size, image_size, channels)]


def _merged(pairs: Iterable[tuple[str, dict]]) -> list[dict]:
    """Sums the rows of each name; the output is that of the last."""
    table: dict[str, dict] = {}
    for name, row in pairs:
        before = table.get(name, {"parameters": 0, "multiply_adds": 0})
        counts = {key: before[key] + row[key] for key in ("parameters", "multiply_adds")}
        table[name] = _row(name, row["output_shape"], **counts)
    return list(table.values())


def _stages(rows: list[dict], input_shape: Sequence) -> list[dict]:
    """One row for the stem, each stage and the head; none where the layers' names do not tell them."""
    section, pairs, blocks = "stem", [], {}
    for row in rows:
        found = _SECTIONS.match(row["name"].rpartition("/")[2])
        if found:
            section = found["stage"] or ("head" if found["head"] else "stem")
            if found["block"]:
                blocks.setdefault(section, set()).add(found["block"])
        # A layer of another name belongs to the section that it comes in: a pooling, or a head of one's own.
        pairs.append((section, row))
    stages = _merged(pairs) if blocks else []
    for stage in stages:
        stage["blocks"] = len(blocks[stage["name"]]) if stage["name"] in blocks else None
        output = stage["output_shape"]
        is_map = len(output) == len(input_shape) == 3
        stage["stride"] = round(input_shape[0] / output[0]) if is_map else None
    return stages


def _text(report: dict, layers: bool) -> str:
    lines = [f"{report['model']}: input {_shape(report['input_shape'])}, output {_shape(report['output_shape'])}"]
    if report["trainable_parameters"] != report["parameters"]:
        lines.append(f"{report['trainable_parameters']:,} of {report['parameters']:,} parameters are trainable")
    lines += _preprocessing(report["metadata"])
    total = {"name": "total", "parameters_share": 1.0, "multiply_adds_share": 1.0}
    total |= {key: report[key] for key in ("parameters", "multiply_adds")}
    lines += ["", *_table([*report["stages"], total])]
    if layers:
        lines += ["", *_table([*report["layers"], total])]
    return "\n".join(lines)


def _table(rows: list[dict]) -> list[str]:
    cells = [
        (
            row["name"],
            str(row.get("blocks") or ""),
            _shape(row.get("output_shape")),
            str(row.get("stride") or ""),
            f"{row['parameters']:,}",
            f"{row['parameters_share']:.1%}",
            f"{row['multiply_adds']:,}",
            f"{row['multiply_adds_share']:.1%}",
        )
        for row in rows
    ]
    staged = any(row.get("blocks") for row in rows)
    keep = [i for i, title in enumerate(_COLUMNS) if staged or title not in ("blocks", "stride")]
    titles = _COLUMNS if staged else ("layer", *_COLUMNS[1:])
    cells = [[row[i] for i in keep] for row in (titles, *cells)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keep))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _shape(shape: Sequence | None) -> str:
    if shape and isinstance(shape[0], (list, tuple)):
        return ", ".join(_shape(one) for one in shape)
    return " x ".join(str(size) for size in shape or ())


def _preprocessing(metadata: dict) -> list[str]:
    parts = []
    for key, about in (("mean_rgb", "mean"), ("stddev_rgb", "deviation")):
        if isinstance(metadata.get(key), list):
            parts.append(f"{about} {', '.join(f'{value:.2f}' for value in metadata[key])}")
    if parts:
        parts[-1] += " (of pixels 0 to 255)"
    if metadata.get("crop"):
        parts.append(f"crop {metadata['crop']}")
    if metadata.get("image_size"):
        parts.append(f"image size {metadata['image_size']}")
    lines = [f"preprocessing: {'; '.join(parts)}"] if parts else []
    names = metadata.get("class_names")
    if names:
        shown = [str(name) if str(name).isprintable() else repr(name) for name in names[:10]]
        lines.append(f"{len(names)} classes: {', '.join(shown)}{', ...' if len(names) > 10 else ''}")
    return lines
