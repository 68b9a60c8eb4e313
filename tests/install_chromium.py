"""What tests/server/test_serve_page.py needs and pip cannot install: Chromium and its driver,
by apt, as root. Fails without them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys


def main() -> None:
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        sys.exit(
            "chromium and chromedriver are missing; on Debian: apt-get install chromium "
            "chromium-driver"
        )
    subprocess.run(["apt-get", "update", "-qq"], check=False)
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    subprocess.run([*command, "chromium", "chromium-driver"], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
