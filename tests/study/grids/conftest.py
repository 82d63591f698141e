import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "slurm" / "cluster.sh"


@pytest.fixture(scope="session")
def cluster():
    """A real SLURM on this machine, which all programs that the tests start find by ``SLURM_CONF``."""
    folder = Path(tempfile.mkdtemp(prefix="molf-slurm-"))  # not pytest's, which may be gone before the daemons are
    with pytest.MonkeyPatch.context() as patch:
        try:
            started = subprocess.run(
                [CLUSTER, "start", folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            if started.returncode != 0:
                # In continuous integration, a SLURM that cannot be tested against is an error, not an excuse.
                (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(started.stderr.strip())
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            yield folder
        finally:
            subprocess.run([CLUSTER, "stop", folder], check=True, stdout=subprocess.DEVNULL)
            shutil.rmtree(folder, ignore_errors=True)
