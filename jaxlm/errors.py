"""The ways a run ends early on purpose; everything else that raises is a bug."""

import os
import sys

LONGEST_MESSAGE = 2000  # characters


class UserError(Exception):
    """Something the user can mend: bad configuration, file, folder or checkpoint. Its text is one line; exit code 2."""


class RunFailed(Exception):
    """Training can't go on, for a reason that is no bug and was not there at the start. Exit code 1."""


class Diverged(RunFailed):
    """What the numbers of a run have become leaves nothing to train."""


class Stopped(BaseException):  # as KeyboardInterrupt: no library may take it for an error of its own
    """The run was asked to stop; its state is saved and the same command goes on. Exit code 75."""

    said = False

    def say(self) -> None:
        """Prints the message on stderr, once."""
        if not self.said:
            print(f"stopped: {printable(self)}", file=sys.stderr, flush=True)
            self.said = True


class ProgramStopped(Stopped, SystemExit):
    """A program that lets it pass ends with exit code 75; it would end a session at a prompt, too."""

    code = os.EX_TEMPFAIL


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())


def printable(error: BaseException) -> str:
    """Its text on one line, harmless to a terminal; what a file or an argument put into it may be long."""
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in one_line(error))
    return (
        text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"
    )
