import subprocess
import sys

import ptp


def test_every_public_name_is_there_and_nothing_else_is() -> None:
    assert {name for name in ptp.__all__ if getattr(ptp, name) is None} == set()
    assert sorted(ptp.__all__) == ptp.__all__


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, ptp, ptp.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
