"""maxlm smoke"""

import typer

from maxlm.cli.common import ConfigArgument, SettingsArgument, open_console


def command(config: ConfigArgument, settings: SettingsArgument = None) -> None:
    """Shrink a run to this device and try all of it: steps, checkpoint, restore,
    generation."""
    from maxlm.run.load_config import load_run_config
    from maxlm.train.smoke import smoke

    run = load_run_config(config, settings or ())
    console = open_console()
    failed = 0
    for check in smoke(run):
        failed += not check.passed
        verdict = "[green]pass[/]" if check.passed else "[red]FAIL[/]"
        console.print(f"{verdict}  {check.name:<34} [dim]{check.detail}[/]")
    console.print(f"{config}: {f'{failed} checks failed' if failed else 'works'}")
    if failed:
        raise typer.Exit(1)
