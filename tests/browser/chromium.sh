#!/usr/bin/env bash
# Debian's Chromium and its driver, for the test of the report page: installs them where they are missing (needs root).
set -euo pipefail

fail() { echo "chromium.sh: $*" >&2; exit 1; }

if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
command -v apt-get >/dev/null || fail "there is no chromium with chromedriver, and no apt-get to install them with"
[ "$(id -u)" = 0 ] || fail "there is no chromium with chromedriver, and only root can install them: apt-get install chromium-driver"
export DEBIAN_FRONTEND=noninteractive
(
  flock 9 # tests in another process may install SLURM now
  apt-get update -qq >/dev/null || fail "apt-get update failed"
  apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null ||
    fail "chromium and chromium-driver cannot be installed"
) 9>/var/lock/molf-tests-apt
