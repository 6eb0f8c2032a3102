"""A hook of mkdocs.yml: where the pages come from, and a reference page for each public module.

Files keep their place in the repository, so that a link between two of them is the same here and in a clone. Modules
are read, not imported: pages are made without Keras.
"""

import ast
import functools
import json
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = "nfnet_keras"
# What pages are made of and what they link to.
FILES = (
    *("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"),
    *("docs/*.md", "docs/*.png", "docs/*.json", "docs/benchmarks/*", "weights/*.md", "benchmarks/tried.md"),
    *("examples/*.py", "examples/*.ipynb", "tests/test_*.py", "tests/*/test_*.py"),
)
_EXAMPLE = re.compile(r"^Example:\n\s*(?=^ *>>> )", re.MULTILINE)
_CONSTRUCTOR = re.compile(r'^(\w+) = _constructor\(VARIANTS\["(\w+)"\]\)', re.MULTILINE)


def public_modules() -> list[str]:
    """Returns the dotted names of the modules that have a page, packages before what is in them."""
    names = []
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return sorted(names)


def page_of(module: str) -> str:
    """Returns the path of a module's page."""
    path = f"reference/{module.replace('.', '/')}"
    return f"{path}/index.md" if _is_package(module) else f"{path}.md"


def _is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/")).is_dir()


@functools.cache
def _source(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


@functools.cache
def _definitions(module: str) -> dict[str, str]:
    """Returns the classes and functions defined in a module, with the first line of what they say of themselves."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.parse(_source(module)).body if isinstance(node, kinds)]
    return {node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in nodes}


def _exports(package: str) -> list[tuple[str, str]]:
    """Returns the names in a package's `__all__`, each with the module it is from."""
    tree = ast.parse(_source(package))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    origins = {alias.name: node.module for node in imports for alias in node.names}
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
    return [(name, origins.get(name, package)) for each in lists for name in ast.literal_eval(each)]


def _row(package: str, name: str, origin: str) -> str:
    """Returns the line of a package's table for one of its names, with a link to where it is described."""
    if name in _definitions(origin):
        return f"| [`{name}`][{origin}.{name}] | {_definitions(origin)[name]} |"
    module = f"{origin}.{name}" if f"{origin}.{name}" in public_modules() else origin
    if module not in public_modules() or module == package:
        return f"| `{name}` | |"
    link = "/".join([".."] * (page_of(package).count("/"))) + "/" + page_of(module)
    about = (ast.get_docstring(ast.parse(_source(module))) or "").partition("\n")[0]
    return f"| [`{name}`]({link}) | {about if module.endswith('.' + name) else ''} |"


def _text(module: str) -> str:
    """Returns a module's page: what it says of itself, and what is defined in it or, of a package, what it offers."""
    if _is_package(module):
        names = _exports(module)
        table = "\n".join(["| name | |", "| --- | --- |", *(_row(module, *name) for name in names)])
        options = "    options:\n      members: false\n"
        return f"# {module}\n\n::: {module}\n{options}\n{table if names else ''}\n"
    constructors = _CONSTRUCTOR.findall(_source(module))
    return f"# {module}\n\n::: {module}\n" + (_constructors(constructors) if constructors else "")


def _constructors(pairs: list[tuple[str, str]]) -> str:
    costs = json.loads((ROOT / PACKAGE / "applications" / "costs.json").read_text(encoding="utf-8"))
    rows = [f"| `{title}` | `{name}` | {costs[name]['parameters'] / 1e6:.1f} M |" for title, name in pairs]
    head = "\n## Constructors\n\nThey take the builder's arguments, without the variant.\n\n"
    return head + "\n".join(
        ["| constructor | name for `create_model` | parameters |", "| --- | --- | --- |", *rows, ""]
    )


def _navigation(module: str) -> list:
    """Returns a package's own page, its modules and, each with its own list, its packages."""
    entries = [{"Overview": page_of(module)}]
    for name in public_modules():
        parent, _, title = name.rpartition(".")
        if parent == module:
            entries.append({title: _navigation(name) if _is_package(name) else page_of(name)})
    return entries


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills in the navigation of the reference."""
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = _navigation(PACKAGE)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the repository's pages and pictures, and the reference, in the place of what lies in docs/."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for pattern in FILES for path in ROOT.glob(pattern)}):
        files.append(File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls))
    for module in public_modules():
        files.append(File.generated(config, page_of(module), content=_text(module)))
    return files


class Examples(griffe.Extension):
    """Makes a section of `Example:` and the doctest below it, which griffe would take for a quotation."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Indents what belongs to the section."""
        before, match, body = _split(obj.docstring.value) if obj.docstring else ("", None, "")
        if match:
            indent = "" if body.startswith(" ") else "    "
            lines = [f"{indent}{line}" if line else "" for line in body.splitlines()]
            obj.docstring.value = before + "Examples:\n" + "\n".join(lines)


def _split(text: str) -> tuple[str, re.Match | None, str]:
    match = _EXAMPLE.search(text)
    return (text[: match.start()], match, text[match.end() :]) if match else (text, None, "")
