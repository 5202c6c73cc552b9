#!/usr/bin/env bash
# Installs the Debian packages that some tests need: chromium (report pages) and Ceph (a real S3 server).
# Where that is impossible it says so and succeeds: those tests then skip and say why.
set -euo pipefail

declare -A package_of=([chromium]=chromium [ceph-mon]=ceph-mon [ceph-osd]=ceph-osd [ceph]=ceph-common [radosgw]=radosgw)
missing=()
for program in "${!package_of[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package_of[$program]}")
done
[ ${#missing[@]} -eq 0 ] && exit 0

without() {
  echo "system-packages.sh: not installed: ${missing[*]} ($1); the tests that need them will be skipped" >&2
  exit 0
}
command -v apt-get >/dev/null || without "no apt-get here"
[ "$(id -u)" -eq 0 ] || without "needs root"

echo "system-packages.sh: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; }
# A first try with the lists that are there; most often it is enough, or else they are old.
install 2>/dev/null || { apt-get update -qq && install; } || without "apt-get failed, see above"
