"""The `esr-distill` command. Options come from the dataclasses of config/; a name that is not there is an error.

esr-distill train --config run.yaml [--rollout.horizon 100 ...]
esr-distill train --resume runs/esr
esr-distill check --config run.yaml [--processes 4] [--output check.json]
esr-distill eval --model runs/esr/checkpoint-000200 --prompts problems.jsonl
esr-distill demo [--task pointer]
esr-distill demo-real
"""

import argparse
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from esr_distill.config import EvalConfig
from esr_distill.config_file import load_saved_config, parse_train_options, train_parser
from esr_distill.demo.settings import DemoConfig
from esr_distill.exit_status import BAD_INPUT, INTERRUPTED, NOT_FINITE
from esr_distill.input_error import InputError
from esr_distill.real_demo.settings import RealDemoConfig
from esr_distill.strict_parser import strict_parser


def settings_parser(settings: type, description: str) -> ArgumentParser:
    """Flags for the fields of one flat dataclass."""
    parser = strict_parser(description=description)
    parser.add_class_arguments(settings, None)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 0 or one of `exit_status.py`."""
    argv = sys.argv[1:] if argv is None else argv
    trainer, checker = train_parser(), train_parser()
    checker.description = "Ask before a run whether its config would train, and train what is meant."
    checker.add_argument("--output", type=str, default=None, help="JSON file for the findings.")
    checker.add_argument(
        "--processes", type=int, default=1, help="How many processes you will start (torchrun, accelerate launch)."
    )
    commands = {
        "eval": settings_parser(EvalConfig, "Accuracy of a model on problems with answers, greedy or over samples."),
        "demo": settings_parser(DemoConfig, "Distil a tiny student by ESR and by full rollouts, with a report."),
        "demo-real": settings_parser(RealDemoConfig, "A short ESR distillation of SmolLM2-135M on GSM8K prompts."),
    }
    parser = strict_parser(prog="esr-distill", description="On-policy distillation with Early Stopping Rollout.")
    subcommands = parser.add_subcommands()
    subcommands.add_subcommand("train", trainer)
    subcommands.add_subcommand("check", checker)
    for name, subparser in commands.items():
        subcommands.add_subcommand(name, subparser)
    options = parser.parse_args(argv)
    command, settings = options.subcommand, options[options.subcommand]
    try:
        if command == "train":
            return run_train(settings, argv)
        if command == "check":
            return run_check(settings, argv)
        return run_command(command, commands[command].instantiate(settings).as_dict())
    except InputError as error:
        print(f"esr-distill {command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except FloatingPointError as error:
        print(f"esr-distill {command}: {error}", file=sys.stderr)
        return NOT_FINITE
    except KeyboardInterrupt:
        print(f"esr-distill {command}: stopped; what the last checkpoint holds is kept", file=sys.stderr)
        return INTERRUPTED


def run_train(options: Namespace, argv: list[str]) -> int:
    if options.resume is not None:
        if argv not in (["train", "--resume", options.resume], ["train", f"--resume={options.resume}"]):
            raise InputError(
                f"--resume must be the only option, since the run's own config.yaml is used, got {argv[1:]}"
            )
        config = load_saved_config(Path(options.resume))
    else:
        config = parse_train_options(argv[1:])
    from esr_distill.devices.launcher import leave_processes
    from esr_distill.progress import make_console
    from esr_distill.train import train

    result = train(config, make_console(), resume=options.resume is not None)
    status = 0 if result.finished else INTERRUPTED
    leave_processes(status)
    return status


def run_check(options: Namespace, argv: list[str]) -> int:
    if options.resume is not None:
        raise InputError(
            f"--resume must be left out, since a run that began was checked by itself, got {options.resume!r}"
        )
    # The options of training are read as `train` reads them, a preset included.
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--output")
    own.add_argument("--processes")
    config = parse_train_options(own.parse_known_args(argv[1:])[1])
    from esr_distill.checks.check_command import check_config
    from esr_distill.progress import make_console

    return check_config(config, make_console(), options.output, options.processes)


def run_command(command: str, fields: dict) -> int:
    # Imported here, so that `esr-distill --help` and a mistyped option do not wait for torch and transformers.
    if command == "eval":
        from esr_distill.evaluation.evaluate_command import evaluate_model

        return evaluate_model(EvalConfig(**fields))
    if command == "demo":
        from esr_distill.demo.run import run_demo

        return run_demo(DemoConfig(**fields))
    from esr_distill.real_demo.run import run_real_demo

    return run_real_demo(RealDemoConfig(**fields))


if __name__ == "__main__":
    sys.exit(main())
