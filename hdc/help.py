"""How `hdc-train COMMAND --help` looks."""

import argparse
import re
import shutil

from jsonargparse import DefaultHelpFormatter

WIDEST = 100
SIMPLE = r"(int|float|str)(?: \| null)?"  # types that take the place of an option's value


class HelpFormatter(DefaultHelpFormatter):
    """As wide as the terminal up to `WIDEST`, the epilog as it is written, types and values as one types them."""

    def __init__(self, prog: str) -> None:
        width = min(WIDEST, shutil.get_terminal_size((WIDEST, 0)).columns)
        super().__init__(prog, max_help_position=34, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        simple = re.fullmatch(SIMPLE, self._get_type_str(action) or "")
        return simple[1].upper() if simple else super()._get_default_metavar_for_optional(action)

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        if action.nargs == 0:
            text = text.removesuffix(" (default: False)")  # a switch
        text = re.sub(r"\brequired, (?=.*default: )", "", text)  # of a group that has a default
        # What stands beside the option's name already.
        text = re.sub(rf"type: {SIMPLE}, |, type: {SIMPLE}(?=\))", "", text)
        text = re.sub(r"type: (Literal\[.*\]|bool), ", "", text)
        text = re.sub(r"Optional\[Literal\[(.*)\]\]", r"one of \1, or null", text)
        text = re.sub(r"Optional\[tuple\[(\w+), \.\.\.\]\]", r"[\1, ...] | null", text)
        text = re.sub(r"tuple\[(\w+), \.\.\.\]", r"[\1, ...]", text)
        text = re.sub(r"default: \(([^()]*?),?\)", r"default: [\1]", text)
        return re.sub(r"default: (True|False)", lambda found: found[0].lower(), text)
