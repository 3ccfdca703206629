"""The scripts of ``lit-merge completion``: for each shell, a function of commands and their words.

Words are, by command, its options with the values that can be listed. Where none are, the shell
completes files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Words = Mapping[str, Mapping[str, tuple[str, ...]]]

_BASH = """\
# Completion of lit-merge for bash. To use it: eval "$(lit-merge completion bash)"
_lit_merge() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} option=${{COMP_WORDS[COMP_CWORD-1]}} words=""
  if [[ $COMP_CWORD -eq 1 || ( $COMP_CWORD -eq 2 && $option == help ) ]]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  # The shell takes --option=value apart at the sign.
  if [[ $word == "=" ]]; then
    word=""
  elif [[ $option == "=" ]]; then
    option=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  case "${{COMP_WORDS[1]}} $option" in
{values}
  esac
  if [[ -z $words && $word == -* ]]; then
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
  fi
{bare}
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _lit_merge lit-merge"""

_BARE = """\
  if [[ ${{COMP_WORDS[1]}} == {command} ]]; then
    words="{words}"
  fi"""


def bash(words: Words) -> str:
    """Return the script for bash (3.2 or newer)."""
    values = [
        f'    "{command} {option}") words="{" ".join(listed)}" ;;'
        for command, options in words.items()
        for option, listed in options.items()
        if listed
    ]
    options = [
        f'      {command}) words="{" ".join(o for o in named if o.startswith("-"))}" ;;'
        for command, named in words.items()
    ]
    bare = [
        _BARE.format(command=command, words=" ".join(named))
        for command, named in words.items()
        if named and not any(word.startswith("-") for word in named)
    ]
    return _BASH.format(
        commands=" ".join((*words, "help")),
        values="\n".join(values),
        options="\n".join(options),
        bare="\n".join(bare),
    )


def zsh(words: Words) -> str:
    """Return the script for zsh, which is bash's behind zsh's own emulation."""
    first, _, rest = bash(words).partition("\n")
    loads = [f"autoload -U +X {name} && {name}" for name in ("compinit", "bashcompinit")]
    return "\n".join((first.replace("bash", "zsh"), *loads, rest))


def fish(words: Words) -> str:
    """Return the script for fish."""
    lines = [
        "# Completion of lit-merge for fish. To use it:",
        "# lit-merge completion fish > ~/.config/fish/completions/lit-merge.fish",
        f"complete -c lit-merge -n __fish_use_subcommand -f -a '{' '.join((*words, 'help'))}'",
    ]
    for command, options in words.items():
        begin = f"complete -c lit-merge -n '__fish_seen_subcommand_from {command}'"
        for option, listed in options.items():
            if not option.startswith("--"):
                lines.append(f"{begin} -f -a '{option}'")
            elif listed:
                lines.append(f"{begin} -l {option[2:]} -x -a '{' '.join(listed)}'")
            else:
                lines.append(f"{begin} -l {option[2:]} -r")
    return "\n".join(lines)


SCRIPTS: Mapping[str, Callable[[Words], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
"""What writes the script, by shell."""
