"""man/: the pages and the program say the same."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from vdiskfs.config import AzureConfig, Config, MachinesConfig
from vdiskfs.quiesceconfig import QuiesceConfig
from vdiskfs.watchsettings import MailConfig, WatchConfig, WebhookConfig
from vdiskfs_tools.call import GlobalOption
from vdiskfs_tools.main import cli

MAN = Path(__file__).parents[2] / "man"
PAGES = ["vdiskfs.1", "vdiskfs.conf.5"]
TABLES: dict[str, type[Any]] = {
    "azure": AzureConfig, "machines": MachinesConfig, "watch": WatchConfig, "mail": MailConfig,
    "webhook": WebhookConfig,
}  # fmt: skip


def plain(text: str) -> str:
    """Return roff without its escapes."""
    return re.sub(r"\\f[A-Z]", "", text).replace(r"\-", "-").replace(r"\(dq", '"')


def sections(page: str, level: str = "SH|SS") -> dict[str, str]:
    """Return the text of each section by its heading."""
    parts = re.split(rf"(?m)^\.(?:{level}) +(.*)\n", plain((MAN / page).read_text()))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tags(text: str) -> list[str]:
    """Return the lines after .TP."""
    return re.findall(r"(?m)^\.TP\n(?:\.[A-Z]+ )?(.*)$", text)


def commands(
    command: click.Command = cli, path: tuple[str, ...] = ("vdiskfs",)
) -> Iterator[tuple[str, click.Command]]:
    """Return the commands that do something, by what is typed."""
    if not isinstance(command, click.Group):
        yield " ".join(path), command
        return
    for name, inner in command.commands.items():
        yield from commands(inner, (*path, name))


def own_options(command: click.Command) -> set[str]:
    return {
        name
        for param in command.params
        if isinstance(param, click.Option) and not isinstance(param, GlobalOption)
        for name in param.opts
    }


def documented() -> dict[str, set[str]]:
    """Return the options of each command in the page, by the command's name."""
    known = {name for name, _ in commands()}
    found = {}
    for heading, text in sections("vdiskfs.1").items():
        words = heading.split()
        if words[0] != "vdiskfs":
            continue
        length = max((n for n in (2, 3, 4) if " ".join(words[:n]) in known), default=len(words))
        found[" ".join(words[:length])] = {
            option for tag in tags(text) for option in re.findall(r"(?<![\w-])--?[a-z-]+", tag)
        }
    return found


def test_each_command_and_option_is_in_the_page_and_no_other() -> None:
    assert documented() == {name: own_options(command) for name, command in commands()}


def test_the_global_options_are_in_the_page_and_no_other() -> None:
    text = sections("vdiskfs.1")["OPTIONS"]
    found = {name for tag in tags(text) for name in re.findall(r"(?<![\w-])--?[a-z-]+", tag)}
    options = [param for param in cli.params if isinstance(param, click.Option)]
    assert found == {name for param in options for name in param.opts} | {"-h", "--help"}


def test_each_command_has_its_arguments_in_the_page() -> None:
    headings = [heading for heading in sections("vdiskfs.1") if heading.startswith("vdiskfs ")]
    for name, command in commands():
        (heading,) = [h for h in headings if f"{h} ".startswith(f"{name} ")]
        arguments = [param for param in command.params if isinstance(param, click.Argument)]
        for argument in arguments:
            shown = argument.make_metavar(click.Context(command)).replace("{", "").replace("}", "")
            assert shown.strip("[]") in heading.replace("[", "").replace("]", "") or (
                set(re.findall(r"[A-Za-z]+", shown)) <= set(re.findall(r"[A-Za-z]+", heading))
            ), (name, shown)


def test_each_command_with_json_has_its_keys_in_the_page() -> None:
    listed = plain(sections("vdiskfs.1")["JSON"])
    for name, _ in commands():
        assert name.removeprefix("vdiskfs ") in listed


def test_each_command_has_an_example_in_its_help() -> None:
    for name, command in commands():
        assert f"\n\b\nExample:\n    {name}" in (command.help or ""), name


def test_each_key_is_in_the_page_with_its_default_and_no_other() -> None:
    found = sections("vdiskfs.conf.5")
    lines = [tag.replace(' " (default: ', " = ").removesuffix(')"') for tag in tags(found["KEYS"])]
    table = tomllib.loads("\n".join(line.replace(" (default: ", " = ") for line in lines))
    assert set(table) | {*TABLES, "quiesce"} == {item.name for item in fields(Config)}
    assert Config.from_dict(table, where="page") == Config()
    for name, config in {**TABLES, "quiesce.DISK": QuiesceConfig}.items():
        assert set(tags(found[f"[{name}]"])) == {item.name for item in fields(config)}


def test_the_example_in_the_page_is_a_configuration() -> None:
    example = sections("vdiskfs.conf.5")["EXAMPLE"]
    text = example.replace(".nf", "").replace(".fi", "")
    assert Config.from_dict(tomllib.loads(text), where="page") != Config()


def test_the_exit_codes_are_in_the_page() -> None:
    codes = tags(sections("vdiskfs.1")["EXIT STATUS"])
    assert codes == ["0", "1", "2", "3", "4", "5", "6", "7", "130"]


@pytest.mark.parametrize("page", PAGES)
def test_the_formatter_has_nothing_to_say(page: str) -> None:
    for command in (
        ["man", "--warnings", "-l", str(MAN / page)],
        ["groff", "-ww", "-man", "-Tutf8", str(MAN / page)],
    ):
        environ = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANPAGER": "cat"}
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
        assert result.stderr == ""
        assert len(result.stdout) > 1000
