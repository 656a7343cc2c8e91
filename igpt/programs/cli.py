"""`igpt COMMAND`: each command is a module with a frozen dataclass `Options` and `run(options) -> dict`.

The dataclass is the command line: `igpt train --help`. Progress goes to stderr; the last line of stdout is the result
as one JSON object. Exit code 2 for what the user can mend, told in one line; 1 for a training that went wrong; 130, as
shells have it, for Ctrl-C.
"""

import importlib
import json
import os
import sys
import warnings

import igpt

COMMANDS = {  # name: what it does
    "info": "parameters, FLOPs a token and the memory plan of a preset",
    "palette": "fit the colours of a picture set",
    "encode": "a folder of pictures to a token set",
    "train": "pretrain; resumes a run directory by itself; runs under torchrun too",
    "eval": "nats and bits a pixel of a model on a picture set",
    "probe": "linear probe of every layer",
    "finetune": "fine-tune with a classifier",
    "classify": "what is in your own pictures, by a fine-tuned model",
    "lowdata": "few labels a class",
    "sample": "sample pictures",
    "complete": "complete pictures whose top is given",
    "web": "complete pictures in the browser, row by row as they are drawn",
    "convert": "a checkpoint of ours, Hugging Face's or OpenAI's to ours or Hugging Face's",
    "demo": "train on the built-in emoji for 3 minutes, then complete some that were held out",
}
USAGE = "usage: igpt COMMAND [OPTIONS]\n\nImage GPT: train, probe, complete, and measure it.\n\ncommands:\n"
USAGE += "".join(f"  {name:<10} {does}\n" for name, does in COMMANDS.items())
USAGE += "\nigpt COMMAND --help shows a command's options and their defaults; igpt --version the version.\n"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--"]:  # torchrun -m igpt -- train ...: without it, torchrun takes --run for its own --run-path
        argv = argv[1:]
    if argv[:1] == ["--version"]:
        print(f"igpt {igpt.__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"igpt: unknown command {name!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    program = importlib.import_module(f"igpt.programs.{name}")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"igpt {name}: {message}", file=sys.stderr)
            result = program.run(parse(program.Options, rest, name))
    except (ValueError, OSError) as error:
        print(f"igpt {name}: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"igpt {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nigpt {name}: stopped", file=sys.stderr)
        return 130
    if os.environ.get("RANK", "0") == "0":
        lost = []  # NaN and infinities, which JSON doesn't have: null
        result = json.loads(json.dumps(result), parse_constant=lost.append)
        print(json.dumps(result), flush=True)
        if lost:
            print(f"igpt {name}: got {', '.join(lost)}, null in the line above", file=sys.stderr)
            return 1
    return 0


def parse(options: type, argv: list[str], name: str):
    """`options` filled from the command line. tyro prints help and mistakes itself and exits."""
    import tyro

    return tyro.cli(options, args=argv, prog=f"igpt {name}")
