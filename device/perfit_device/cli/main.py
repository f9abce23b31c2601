"""`perfit`: the device's command line."""

from __future__ import annotations

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session
from perfit_device.settings import prepare_process
from perfit_shared.command_line import run_command
from perfit_shared.command_tree import Deferred

__all__ = ["app", "run"]

app = typer.Typer(
    name="perfit",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(context: typer.Context, profile: ProfileOption = None, json: JsonFlag = False) -> None:
    """A personal language model whose personality stays on this device.

    \b
    perfit enroll -                                  paste the operator's invite
    perfit history import mine.jsonl --task news_headline
    perfit update                                    train your shift
    perfit ask "The council met until dawn."         a personal answer
    perfit ask "The council met until dawn." --compare

    \b
    Settings: PERFIT_HOME (default ~/.perfit), PERFIT_PROFILE, and for scripts
    PERFIT_PASSPHRASE, PERFIT_PASSPHRASE_FILE or PERFIT_PASSPHRASE_COMMAND.
    PERFIT_COSTLY_VAULT=1 opens a vault whose key costs more than perfit's own do.

    \b
    Exit codes: 0 done, 1 a file or value that cannot be, 2 wrong usage,
    3 no cloud to be reached, or a busy one, 4 the cloud refuses this device,
    5 the gate kept an update out, 6 the vault, 7 an update stopped half-way,
    130 Ctrl-C. With --json errors are {"error": {"code", "message"}} on stderr.
    """
    context.obj = Session(profile=profile, json=json)


# With how its own help begins, as far as one line shows it: `perfit --help` imports none of them.
_COMMANDS = [
    ("enroll", "enroll:enroll", "Enrol this device with a cloud."),
    ("ask", "ask:ask", "Ask the cloud, in your own way."),
    ("chat", "chat:chat", "Talk with your model; /help shows what can be typed."),
    ("correct", "learning:correct", "Put the last answer right in your editor; what you save becomes an"),
    ("commit", "commit:commit", "Write the message of what is staged, in your own way, and commit"),
    ("update", "update:update", "Train your shift on your history."),
    ("evaluate", "evaluate:evaluate", "Loss (nats a token) and the task's metric on the test part of your"),
    ("serve", "serve:serve", "Let apps on this machine use your model, by OpenAI's API."),
    ("insight", "insight:insight", "Show what your shift learned: losses, distance from the seed, and"),
    ("forget", "forget:forget", "Forget examples for good: their rows and keys are overwritten in"),
    ("undo", "profile:undo", "Take back the last update: the version before it is your shift again."),
    ("import", "ownership:import_", "Make an exported shift your own: a new version, which is current."),
    ("backup", "ownership:backup", "Write your profile to one sealed file: examples, versions, kept answers"),
    ("restore", "ownership:restore", "Bring a backup into a profile that enrolled by itself: all of it"),
    ("migrate", "ownership:migrate", "Train anew what was trained against an artefact that the cloud has"),
    ("unenroll", "ownership:unenroll", "Leave the cloud, and wipe the profile: the cloud refuses its cert"),
    ("export", "profile:export", "Write your personal shift to a file, unsealed: who has it can answer"),
    ("status", "profile:status", "Show the profile at a glance: its cloud, and for each task which"),
    ("passphrase", "profile:passphrase", "Change the vault's passphrase; one key is rewrapped, nothing is"),
    ("lock", "agent:lock", "Lock the profile: its agent closes the vault and forgets key and"),
    ("unlock", "agent:unlock", "Unlock the profile's agent, by the passphrase or the OS keyring;"),
    ("doctor", "doctor:doctor", "Look for what is broken: clock, home, disk, proxies, vault, certificate,"),
    ("log", "learning:app", "Answers that are kept to learn from."),
    ("history", "history:app", "The examples that your shift learns from."),
    ("versions", "versions:app", "The versions of your shift."),
    ("profiles", "profiles:app", "List the profiles on this device; a star marks the one that commands"),
    ("config", "config:app", "What is set once for all commands, in config.toml of perfit's home."),
    ("agent", "agent:app", "The process that keeps a profile open, so that its passphrase is"),
]
app.registered_commands += [
    Deferred(name, f"perfit_device.cli.{path}", begins) for name, path, begins in _COMMANDS
]


def run() -> None:
    """Exit codes: perfit_shared.errors."""
    prepare_process()
    run_command("perfit", app)
