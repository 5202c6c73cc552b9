"""`make check`: known vulnerabilities in the pinned dependencies, by pip-audit; where it could not look, that is said and is no success."""

import subprocess
import sys

#: pip-audit's words where a package, or all of them, could not be looked up; without --strict it would count them as sound.
BLIND = ("could not be audited", "Dependency not found", "ConnectionError", "Connection", "Timeout", "Max retries", "Failed to")


def main() -> int:
    arguments = ["--strict", "--no-deps", "--disable-pip", "--progress-spinner", "off", "-r", "constraints.txt"]
    done = subprocess.run([sys.executable, "-m", "pip_audit", *arguments], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    if done.returncode == 0:
        sys.stdout.write("audited: no known vulnerabilities in constraints.txt\n")
        return 0
    sys.stderr.write(f"{said}\n")
    blind = any(word in said for word in BLIND)
    if blind:
        sys.stderr.write("NOT CHECKED: not all dependencies could be audited; try again where index and advisories can be reached\n")
    return 2 if blind else 1


if __name__ == "__main__":
    sys.exit(main())
