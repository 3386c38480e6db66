#!/usr/bin/env bash
# Makes archives of the libraries that the distribution has as shared ones alone, from
# the distribution's own sources, for -DLOCKSTEP_STATIC=ON.
#
#   deploy/install_static.sh FOLDER      FOLDER/libprometheus-cpp-core.a
set -euo pipefail
folder=${1:?usage: deploy/install_static.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
version=$(dpkg-query -W -f '${Version}' prometheus-cpp-dev)
archive=$folder/libprometheus-cpp-core.a
[ -s "$archive" ] && [ "$(cat "$folder/.version" 2>/dev/null)" = "$version" ] && exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The system's own package sources, asked for sources: in a state of their own, so that
# nothing of the system changes.
mkdir -p "$work"/{sources,lists/partial,cache/archives/partial}
for list in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
  [ -f "$list" ] || continue
  case $list in
    *.sources) sed -E 's/^Types:.*/Types: deb-src/' "$list" >"$work/sources/${list##*/}" ;;
    *.list) sed -nE 's/^deb(-src)? /deb-src /p' "$list" | sort -u >"$work/sources/${list##*/}" ;;
  esac
done
cat >"$work/apt.conf" <<END
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$work/sources";
Dir::State::lists "$work/lists";
Dir::Cache "$work/cache";
APT::Sandbox::User "";
END
export APT_CONFIG=$work/apt.conf
cd "$work"
apt-get -qq update || true # a third party's list may have no sources
apt-get -qq source --download-only "prometheus-cpp=$version"
dpkg-source --no-check -x prometheus-cpp_*.dsc source >/dev/null

# The installed headers are what our code is compiled with.
flags="-std=c++17 -O2 -fPIC -D_FORTIFY_SOURCE=2 -fstack-protector-strong -fcf-protection"
flags+=" -I/usr/include -I$work/source/core/src"
for file in "$work"/source/core/src/*.cc "$work"/source/core/src/detail/*.cc; do
  # shellcheck disable=SC2086
  ${CXX:-c++} $flags -c "$file" -o "$(basename "$file" .cc).o"
done
rm -f "$archive"
ar rcs "$archive" ./*.o
echo "$version" >"$folder/.version"
