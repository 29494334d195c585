#!/bin/sh
# Unpacks packages of a Debian release into a folder:
#
#   fetch_debian.sh FOLDER RELEASE ARCHITECTURE PACKAGE...
#
# Reads the mirror from the machine's own package sources and keeps apt's lists and cache in the
# folder, so that nothing of the system changes and no rights are needed.
set -eu

work=$1 suite=$2 architecture=$3
shift 3

. /etc/os-release
if [ "${ID:-}" != debian ] || [ -z "${VERSION_CODENAME:-}" ]; then
  echo "expected Debian with a VERSION_CODENAME, got ${ID:-an unknown system}"
  exit 1
fi
rm -rf "$work"
mkdir -p "$work/sources" "$work/lists/partial" "$work/cache/archives/partial"

# The stanza (or line) that serves this release, with the other suite in its place.
for file in /etc/apt/sources.list.d/*.sources; do
  [ -r "$file" ] && awk -v RS= -v own="$VERSION_CODENAME" -v suite="$suite" '
    $0 ~ "(^|\n)Suites:([^\n]* )?" own "([ \n]|$)" {
      sub("(^|\n)Suites:[^\n]*", "\nSuites: " suite)
      sub("\nComponents:[^\n]*", "\nComponents: main")
      print $0 "\n"
    }' "$file"
done > "$work/sources/own.sources"
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
  [ -r "$file" ] && sed -n -E \
    "s/^(deb( +\[[^]]*\])? +[^ ]+ +)$VERSION_CODENAME +.*\bmain\b.*/\1$suite main/p" "$file"
done > "$work/sources/own.list"
[ -s "$work/sources/own.sources" ] || [ -s "$work/sources/own.list" ] || {
  echo "expected a package source for $VERSION_CODENAME, got none"
  exit 1
}

apt() {
  apt-get -q -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$work/sources" \
    -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User= \
    -o Acquire::Languages=none -o "APT::Architecture=$architecture" \
    -o "APT::Architectures=$architecture" "$@"
}
apt update
cd "$work"
apt download "$@"
for package in *.deb; do dpkg-deb -x "$package" "$work"; done
