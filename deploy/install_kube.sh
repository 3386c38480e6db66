#!/usr/bin/env bash
# Builds what tests/deploy asks about the chart, from the modules that Go's ordinary
# client gets: helm, kubeconform, and a kube-apiserver with its etcd.
#
#   deploy/install_kube.sh FOLDER      programs in FOLDER/bin
#
# Minutes of compiling the first time (about 3 GB of Go's caches), nothing after.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:?usage: deploy/install_kube.sh FOLDER}
mkdir -p "$folder/bin"
bin=$(cd "$folder/bin" && pwd)

needed=1.25
have=$(go env GOVERSION 2>/dev/null | sed 's/^go//' || true)
if [ -z "$have" ] || [ "$(printf '%s\n' "$needed" "$have" | sort -V | head -n 1)" != "$needed" ]; then
  echo "install_kube: Go $needed or newer is needed${have:+, this is $have}" >&2
  exit 1
fi
stripped=(-trimpath -buildvcs=false -ldflags "-s -w")

# What go.sum pins is built again only where it changed.
pins=$(sha256sum tests/deploy/kube/go.mod tests/deploy/kube/go.sum | sha256sum | cut -c1-16)
if [ "$(cat "$bin/.pins" 2>/dev/null)" != "$pins" ]; then
  echo "install_kube: building etcd and kube-apiserver"
  (cd tests/deploy/kube
   go build "${stripped[@]}" -o "$bin/etcd" go.etcd.io/etcd/server/v3
   go build "${stripped[@]}" -o "$bin/kube-apiserver" k8s.io/kubernetes/cmd/kube-apiserver)
  echo "$pins" >"$bin/.pins"
fi
install() { # PROGRAM MODULE@VERSION
  [ -x "$bin/$1" ] && [ "$(cat "$bin/.$1" 2>/dev/null)" = "$2" ] && return
  echo "install_kube: building $1"
  GOBIN=$bin go install -ldflags "-s -w" "$2"
  echo "$2" >"$bin/.$1"
}
install helm helm.sh/helm/v3/cmd/helm@v3.22.0
install kubeconform github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0
