#!/usr/bin/env bash
# The page of --mode=serve in a real browser. One that is installed is taken; else apt-get installs Debian's Chromium
# where it may. Where there is none, the tests are not run, and the last line says so.
set -euo pipefail
cd "$(dirname "$0")/.."

not_run() {
  echo "NOT RUN: tests/test_serve_page.py: $1"
  exit 0
}

browser() {
  command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable
}

if ! browser > /dev/null; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    not_run "no Chromium here, and no apt-get to install one as root"
  fi
  echo "no Chromium here: apt-get install chromium"
  export DEBIAN_FRONTEND=noninteractive
  quiet=(-qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=60 --no-install-recommends)
  # The time limit is on what waits for the network: a package that is cut off half unpacked breaks all others.
  limit=${BROWSER_LIMIT:-120}
  timeout "$limit" apt-get update -qq > /dev/null 2>&1 || not_run "apt-get update failed or took longer than $limit s"
  timeout "$limit" apt-get install -y "${quiet[@]}" --download-only chromium > /dev/null 2>&1 ||
    not_run "apt-get could not fetch chromium in $limit s"
  apt-get install -y "${quiet[@]}" chromium > /dev/null || not_run "apt-get could not install chromium"
fi
.venv/bin/uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[train,serve,test,browser]' ||
  not_run "Playwright could not be installed"
echo "browser: $(browser)"
exec .venv/bin/python -m pytest -n 0 tests/test_serve_page.py
