"""Prints a script that completes the commands, options and config keys of `ligo` in a shell."""

from __future__ import annotations

import argparse

from megatron_ligo import cli, commands
from megatron_ligo.config import typed_toml
from megatron_ligo.config.run_config import RunConfig

EXAMPLE = """
source <(ligo completion bash)
ligo completion zsh > ~/.ligo-completion; echo "source ~/.ligo-completion" >> ~/.zshrc
ligo completion fish > ~/.config/fish/completions/ligo.fish
"""

BASH = """_ligo() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    if [ "$COMP_CWORD" = 1 ]; then
        words="{commands}"
    elif [ "$before" = --set ]; then
        compopt -o nospace 2> /dev/null
        words="{keys}"
    elif [[ "$word" == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$word")); fi
}}
complete -o default -F _ligo ligo
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(__doc__, EXAMPLE, prog=prog)
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")
    return parser


def run(args: argparse.Namespace) -> None:
    print(_fish() if args.shell == "fish" else (ZSH if args.shell == "zsh" else "") + _bash(), end="")


def _options(name: str) -> dict[str, str]:
    """Returns the long options of a command, each with its help."""
    actions = commands.load(name).build_parser()._actions
    shown = [action for action in actions if action.help != argparse.SUPPRESS]
    return {option: action.help or "" for action in shown for option in action.option_strings if option[:2] == "--"}


def _config_keys() -> list[str]:
    return [f"{key}=" for key, _, _ in typed_toml.iterate_settings(RunConfig)]


def _bash() -> str:
    cases = [f'            {name}) words="{" ".join(_options(name))}" ;;' for name in commands.SUBCOMMANDS]
    return BASH.format(commands=" ".join(commands.SUBCOMMANDS), keys=" ".join(_config_keys()), cases="\n".join(cases))


def _fish() -> str:
    lines = []
    for name, command in commands.SUBCOMMANDS.items():
        lines.append(f"complete -c ligo -f -n __fish_use_subcommand -a {name} -d {_quote(command.summary)}")
        for option, text in _options(name).items():
            values = f" -x -a {_quote(' '.join(_config_keys()))}" if option == "--set" else ""
            condition = f"'__fish_seen_subcommand_from {name}'"
            lines.append(f"complete -c ligo -n {condition} -l {option[2:]}{values} -d {_quote(text)}")
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    """Quotes a text for fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
