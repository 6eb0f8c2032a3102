"""`nfnet COMMAND`: finds the command, runs it, and says what went wrong in one line."""

import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence

from absl import flags

from nfnet_keras.version import __version__

# Each command is a module of this package with define_flags() and run(flags), or, where it has ARGUMENTS (a line for
# the usage), run(flags, arguments).
COMMANDS = {
    "train": "train a network on the embedded digits or on a folder of your own images",
    "evaluate": "measure a network on images whose classes are known",
    "predict": "name what is in images",
    "convert": "convert weights between the authors' files, timm's and Keras's",
    "export": "write a network as SavedModel, ONNX, LiteRT or OpenVINO, for programs without Keras",
    "inspect": "print a network's stages, parameters and multiply-adds",
    "list": "list the networks and where their weights come from",
}

USAGE = f"""nfnet {__version__}: normalizer-free networks for Keras

usage: nfnet COMMAND [--flag=value ...]
       nfnet COMMAND --help

commands:
""" + "\n".join(f"  {name:10} {about}" for name, about in COMMANDS.items())


def main(arguments: Sequence[str]) -> int:
    """Runs a command.

    Args:
        arguments: What stands behind `nfnet` on the command line.

    Returns:
        The exit status: 0, 1 where the command failed, 2 where it was not understood, 130 after Ctrl-C, 143 after
        SIGTERM.

    Example:

    >>> main(["--version"])
    nfnet 0.1.0
    0
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"nfnet {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"nfnet: error: there is no command {name!r}; there is: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"nfnet_keras.cli.{name}")
    values = command.define_flags()
    if any(argument in ("-h", "--help") for argument in rest):
        usage = " ".join(["nfnet", name, *filter(None, [getattr(command, "ARGUMENTS", "")]), "[--flag=value ...]"])
        print(f"usage: {usage}\n\n{command.__doc__.strip()}\n\n{_flag_help(values)}")
        return 0
    try:
        left = values([f"nfnet {name}", *rest])[1:]
        if left and not hasattr(command, "ARGUMENTS"):
            raise flags.Error(f"{left[0]!r} is not understood; flags are written --name=value or --name value")
    except flags.Error as error:
        print(f"nfnet {name}: error: {_one_line(error)} (nfnet {name} --help lists the flags)", file=sys.stderr)
        return 2
    return _guarded(name, command, (values, left) if hasattr(command, "ARGUMENTS") else (values,))


def _guarded(name: str, command, arguments: tuple) -> int:
    shows = warnings.showwarning

    def remark(message, category, *place, **more) -> None:
        if category is UserWarning:
            # Where in the program a remark for users comes from is nothing to them.
            print(f"nfnet {name}: {message}", file=sys.stderr)
        else:
            shows(message, category, *place, **more)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = remark
            return command.run(*arguments)
    except KeyboardInterrupt:
        print(f"nfnet {name}: stopped", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("NFNET_TRACEBACK"):
            raise
        print(f"nfnet {name}: error: {_one_line(error)}", file=sys.stderr)
        return 1


# Room for a list of twenty files and what is wrong with each.
_LONGEST = 4000


def _one_line(error: BaseException) -> str:
    text = re.sub(r"^\[Errno -?\d+\] ", "", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ... (NFNET_TRACEBACK=1 shows all)"


def _flag_help(values: flags.FlagValues) -> str:
    lines = []
    for name in values:
        if "-" in name or "." in name:  # an alias
            continue
        flag = values[name]
        default = "" if flag.default is None else f" (default: {flag.default_as_str})"
        lines.append(f"  --{name.replace('_', '-')}\n      {flag.help}{default}")
    return "flags:\n" + "\n".join(lines)


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv[1:]))
