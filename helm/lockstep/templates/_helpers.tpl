{{- define "lockstep.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 50 characters leave room for what is appended. */}}
{{- define "lockstep.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "lockstep.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "lockstep.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* A LeaderWorkerSet makes a headless Service of its own name: it must not be ours. To that name,
   49 characters at most, it adds a group's number and a revision of 10, and what comes of it is
   a label's value. */}}
{{- define "lockstep.setName" -}}
{{- include "lockstep.fullname" . | trunc 43 | trimSuffix "-" }}-group
{{- end }}

{{- define "lockstep.selectorLabels" -}}
app.kubernetes.io/name: {{ include "lockstep.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "lockstep.labels" -}}
{{ include "lockstep.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels of a pod; component is server (it answers) or worker. */}}
{{- define "lockstep.podMetadata" -}}
labels:
  {{- include "lockstep.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .root.Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "lockstep.dnsEgress" -}}
- {{- toYaml .Values.networkPolicy.dns | nindent 2 }}
{{- end }}

{{- define "lockstep.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "lockstep.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "lockstep.imageOf" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "lockstep.image" -}}
{{- include "lockstep.imageOf" (dict "root" . "image" .Values.image) }}
{{- end }}

{{- define "lockstep.coordinatorImage" -}}
{{- if .Values.coordinator.image.repository }}
{{- include "lockstep.imageOf" (dict "root" . "image" .Values.coordinator.image) }}
{{- else }}
{{- include "lockstep.image" . }}
{{- end }}
{{- end }}

{{- define "lockstep.claimName" -}}
{{- .Values.persistence.existingClaim | default (printf "%s-model" (include "lockstep.fullname" .)) }}
{{- end }}

{{- define "lockstep.modelPath" -}}
{{- if .Values.model.subPath }}/models/{{ .Values.model.subPath }}{{ else }}/models{{ end }}
{{- end }}

{{- define "lockstep.ranksPerPod" -}}
{{- div (int .Values.tensorParallelSize) (int .Values.nodes) }}
{{- end }}

{{- define "lockstep.gracePeriod" -}}
{{- add (int .Values.drain.preStopSeconds) (int .Values.drain.timeoutSeconds) 5 }}
{{- end }}

{{/* What no single field's schema can say. */}}
{{- define "lockstep.validate" -}}
{{- $v := .Values }}
{{- if and (ne $v.topology "multinode") (ne (int $v.nodes) 1) }}
{{- fail (printf "nodes: %d with topology %s: only multinode spreads a server over several pods" (int $v.nodes) $v.topology) }}
{{- end }}
{{- if mod (int $v.tensorParallelSize) (int $v.nodes) }}
{{- fail (printf "tensorParallelSize: %d does not divide over nodes: %d; every pod gets as many GPUs" (int $v.tensorParallelSize) (int $v.nodes)) }}
{{- end }}
{{- if and $v.tls.clientCaSecret (not $v.tls.existingSecret) }}
{{- fail "tls.clientCaSecret: clients show a certificate only over TLS; name the server's in tls.existingSecret" }}
{{- end }}
{{- if and $v.tls.clientCaSecret $v.serviceMonitor.enabled (not $v.serviceMonitor.tlsConfig) }}
{{- fail "serviceMonitor.tlsConfig: with tls.clientCaSecret Prometheus needs a certificate to show (cert, keySecret)" }}
{{- end }}
{{- $plane := $v.privatePlane.tls }}
{{- if ne (empty $plane.coordinatorSecret) (empty $plane.workerSecret) }}
{{- fail "privatePlane.tls: coordinatorSecret and workerSecret are needed together: each side asks for the other's certificate" }}
{{- end }}
{{- if and (ne $v.topology "pod") (not $v.privatePlane.allowPlaintext) (not $plane.workerSecret) }}
{{- fail (printf "privatePlane.allowPlaintext: topology %s puts tokens on the pod network in plain text; name the Secrets of privatePlane.tls, set it to true where that network is trusted or encrypted, or use topology pod" $v.topology) }}
{{- end }}
{{- if and (eq $v.topology "split") (or $v.autoscaling.enabled (ne (int $v.replicaCount) 1)) }}
{{- fail "topology: split is one coordinator and one group of workers; for replicas or autoscaling use pod or multinode" }}
{{- end }}
{{- if and $v.fetch.enabled (or (not $v.fetch.image) (not (concat $v.fetch.command $v.fetch.args))) }}
{{- fail "fetch: image and command (or args) are needed: what fills /models" }}
{{- end }}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) }}
{{- fail "ingress.hosts: at least one is needed, {host: ..., paths: [{path: /}]}" }}
{{- end }}
{{- if and $v.autoscaling.enabled (eq $v.autoscaling.type "keda") (not $v.serviceMonitor.enabled) }}
{{- fail "serviceMonitor.enabled: autoscaling.type keda asks Prometheus for this Service's waiting requests; true scrapes them" }}
{{- end }}
{{- $pods := or (gt (int $v.replicaCount) 1) $v.autoscaling.enabled (ne $v.topology "pod") }}
{{- if and $pods (not $v.persistence.existingClaim) (not (has "ReadWriteMany" $v.persistence.accessModes)) }}
{{- fail "persistence.accessModes: several pods read the weights: ReadWriteMany, or an existingClaim that several nodes can mount" }}
{{- end }}
{{- end }}

{{/* Flags that `lockstep serve` and lockstep-coordinator share. */}}
{{- define "lockstep.serverArgs" -}}
{{- $v := .Values -}}
- --model={{ include "lockstep.modelPath" . }}
{{- with $v.model.servedName }}
- {{ printf "--served-model-name=%s" . | quote }}
{{- end }}
- --backend={{ $v.backend }}
- --tensor-parallel-size={{ int $v.tensorParallelSize }}
- --dtype={{ $v.model.dtype }}
- --load-format={{ $v.model.loadFormat }}
{{- with $v.model.quantization }}
- --quantization={{ . }}
{{- end }}
- --kv-cache-dtype={{ $v.model.kvCacheDtype }}
- --max-model-len={{ int $v.model.maxModelLen }}
- --block-size={{ int $v.engine.blockSize }}
- --num-kv-blocks={{ int $v.engine.numKvBlocks }}
- --gpu-memory-utilization={{ $v.gpu.memoryUtilization }}
- {{ ternary "--enable-prefix-caching" "--no-enable-prefix-caching" $v.engine.enablePrefixCaching }}
- --max-num-seqs={{ int $v.engine.maxNumSeqs }}
- --max-num-batched-tokens={{ int $v.engine.maxNumBatchedTokens }}
- --max-queued-requests={{ int $v.engine.maxQueuedRequests }}
- --cpu-threads={{ int $v.engine.cpuThreads }}
- --recovery-timeout={{ $v.engine.recoveryTimeoutSeconds }}
- --drain-timeout={{ $v.drain.timeoutSeconds }}
- --host=0.0.0.0
- --http-port=8000
- --grpc-port=50051
{{- if $v.tls.existingSecret }}
- --ssl-certfile=/etc/lockstep/tls/tls.crt
- --ssl-keyfile=/etc/lockstep/tls/tls.key
{{- end }}
{{- if $v.tls.clientCaSecret }}
- --ssl-ca-certs=/etc/lockstep/client-ca/ca.crt
{{- end }}
- --health-port=8001
{{- if $v.apiKeys.existingSecret }}
- {{ printf "--api-key-file=/etc/lockstep/api-keys/%s" $v.apiKeys.key | quote }}
{{- end }}
{{- with $v.cors.allowedOrigins }}
- {{ printf "--allowed-origins=%s" (join "," .) | quote }}
{{- end }}
{{- if or (not $v.tls.existingSecret) (and (ne $v.topology "pod") (not $v.privatePlane.tls.coordinatorSecret)) }}
# What has no certificate of its own speaks plain text.
- --insecure
{{- end }}
{{- if $v.engine.reflection }}
- --reflection
{{- end }}
- --log-format={{ $v.engine.logFormat }}
- --log-level={{ $v.engine.logLevel }}
{{- with $v.engine.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The same names on both sides. */}}
{{- define "lockstep.planeArgs" -}}
- --worker-ssl-certfile=/etc/lockstep/plane/tls.crt
- --worker-ssl-keyfile=/etc/lockstep/plane/tls.key
- --worker-ssl-ca-certs=/etc/lockstep/plane/ca.crt
{{- end }}

{{- define "lockstep.workerArgs" -}}
- --backend={{ .Values.backend }}
{{- if .Values.privatePlane.tls.workerSecret }}
{{ include "lockstep.planeArgs" . }}
{{- else }}
- --insecure
{{- end }}
- --threads={{ int .Values.engine.cpuThreads }}
- --log-level={{ .Values.engine.logLevel }}
{{- end }}

{{- define "lockstep.doorPorts" -}}
- {name: http, containerPort: 8000}
- {name: grpc, containerPort: 50051}
- {name: health, containerPort: 8001}
{{- end }}

{{/* startup asks the path given: /ready where the pod itself loads the weights. At a port of their
   own: clients may fill the door, or need a certificate that the kubelet has not. */}}
{{- define "lockstep.probes" -}}
{{- $p := .root.Values.probes -}}
startupProbe:
  httpGet: {path: {{ .startup }}, port: health}
  periodSeconds: {{ $p.startup.periodSeconds }}
  timeoutSeconds: 5
  failureThreshold: {{ divf $p.startup.loadTimeoutSeconds $p.startup.periodSeconds | ceil | int }}
livenessProbe:
  httpGet: {path: /health, port: health}
  {{- toYaml $p.liveness | nindent 2 }}
readinessProbe:
  httpGet: {path: /ready, port: health}
  {{- toYaml $p.readiness | nindent 2 }}
{{- end }}

{{- define "lockstep.computeResources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if eq .Values.backend "cuda" }}
{{- $gpus := dict .Values.gpu.resourceName (include "lockstep.ranksPerPod" . | int) }}
{{- $_ := set $resources "limits" (merge (deepCopy $gpus) ($resources.limits | default dict)) }}
{{- $_ := set $resources "requests" (merge (deepCopy $gpus) ($resources.requests | default dict)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "lockstep.env" -}}
- {name: HOME, value: /tmp}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "lockstep.mounts" -}}
- {name: model, mountPath: /models, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Secrets of the doors are for who answers: workers see none. */}}
{{- define "lockstep.secretMounts" -}}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/lockstep/tls, readOnly: true}
{{- end }}
{{- if .Values.tls.clientCaSecret }}
- {name: client-ca, mountPath: /etc/lockstep/client-ca, readOnly: true}
{{- end }}
{{- if .Values.apiKeys.existingSecret }}
- {name: api-keys, mountPath: /etc/lockstep/api-keys, readOnly: true}
{{- end }}
{{- end }}

{{- define "lockstep.containerCommon" -}}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
env:
  {{- include "lockstep.env" . | nindent 2 }}
{{- with .Values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Containers of the three kinds of pod. */}}
{{- define "lockstep.serveContainer" -}}
name: serve
image: {{ include "lockstep.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [lockstep, serve]
args:
  {{- include "lockstep.serverArgs" . | nindent 2 }}
ports:
  {{- include "lockstep.doorPorts" . | nindent 2 }}
{{ include "lockstep.containerCommon" . }}
{{ include "lockstep.probes" (dict "root" . "startup" "/ready") }}
lifecycle:
  preStop: {sleep: {seconds: {{ int .Values.drain.preStopSeconds }}}}
resources:
  {{- include "lockstep.computeResources" . | nindent 2 }}
volumeMounts:
  {{- include "lockstep.mounts" . | nindent 2 }}
  {{- with include "lockstep.secretMounts" . }}
  {{- . | nindent 2 }}
  {{- end }}
  - {name: shm, mountPath: /dev/shm}
{{- end }}

{{- define "lockstep.coordinatorContainer" -}}
name: coordinator
image: {{ include "lockstep.coordinatorImage" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [lockstep-coordinator]
args:
  {{- include "lockstep.serverArgs" . | nindent 2 }}
  - --worker-address=0.0.0.0:50052
  {{- if .Values.privatePlane.tls.coordinatorSecret }}
  {{- include "lockstep.planeArgs" . | nindent 2 }}
  {{- end }}
ports:
  {{- include "lockstep.doorPorts" . | nindent 2 }}
  - {name: workers, containerPort: 50052}
{{ include "lockstep.containerCommon" . }}
# It waits for the workers as long as they take: only its own start is timed.
{{ include "lockstep.probes" (dict "root" . "startup" "/health") }}
lifecycle:
  preStop: {sleep: {seconds: {{ int .Values.drain.preStopSeconds }}}}
resources:
  {{- toYaml .Values.coordinator.resources | nindent 2 }}
volumeMounts:
  {{- include "lockstep.mounts" . | nindent 2 }}
  {{- if .Values.privatePlane.tls.coordinatorSecret }}
  - {name: plane, mountPath: /etc/lockstep/plane, readOnly: true}
  {{- end }}
  {{- with include "lockstep.secretMounts" . }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* address: where the coordinator is; node: which pod of the group, from 1. */}}
{{- define "lockstep.workerContainer" -}}
{{- $v := .root.Values -}}
name: workers
image: {{ include "lockstep.image" .root }}
imagePullPolicy: {{ $v.image.pullPolicy }}
command: [lockstep, worker-group]
args:
  - --count
  - {{ include "lockstep.ranksPerPod" .root | quote }}
  - --node
  - {{ .node | quote }}
  - --log-format={{ $v.engine.logFormat }}
  - --
  - --coordinator={{ .address }}
  {{- include "lockstep.workerArgs" .root | nindent 2 }}
{{ include "lockstep.containerCommon" .root }}
# Workers serve the coordinator's drain to its end: they are told to stop after it.
lifecycle:
  preStop: {sleep: {seconds: {{ add (int $v.drain.preStopSeconds) (int $v.drain.timeoutSeconds) }}}}
resources:
  {{- include "lockstep.computeResources" .root | nindent 2 }}
volumeMounts:
  {{- include "lockstep.mounts" .root | nindent 2 }}
  {{- if $v.privatePlane.tls.workerSecret }}
  - {name: plane, mountPath: /etc/lockstep/plane, readOnly: true}
  {{- end }}
  - {name: shm, mountPath: /dev/shm}
{{- end }}

{{/* A pod's spec around its container. computes: it has the GPUs; answers: it has the
   doors, and comes first, so it fetches. */}}
{{- define "lockstep.podSpec" -}}
{{- $v := .root.Values -}}
{{- $placed := ternary $v $v.coordinator .computes -}}
serviceAccountName: {{ include "lockstep.serviceAccountName" .root | quote }}
automountServiceAccountToken: false
# Variables of Services would be read as flags: LOCKSTEP_HTTP_PORT is --http-port.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "lockstep.gracePeriod" .root }}
securityContext:
  {{- toYaml $v.podSecurityContext | nindent 2 }}
{{- with $v.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if and $v.fetch.enabled .answers }}
initContainers:
  - name: fetch
    image: {{ $v.fetch.image | quote }}
    {{- with $v.fetch.command }}
    command:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $v.fetch.args }}
    args:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    env:
      - {name: HOME, value: /tmp}
      {{- if $v.fetch.tokenSecretRef.name }}
      - name: {{ $v.fetch.tokenEnv | quote }}
        valueFrom:
          secretKeyRef: {name: {{ $v.fetch.tokenSecretRef.name | quote }}, key: {{ $v.fetch.tokenSecretRef.key | quote }}}
      {{- end }}
      {{- with $v.fetch.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    securityContext:
      {{- toYaml $v.securityContext | nindent 6 }}
    resources:
      {{- toYaml $v.fetch.resources | nindent 6 }}
    volumeMounts:
      - {name: model, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
{{- end }}
containers:
  - {{- .container | nindent 4 }}
volumes:
  - name: model
    persistentVolumeClaim: {claimName: {{ include "lockstep.claimName" .root | quote }}}
  - name: tmp
    emptyDir: {sizeLimit: {{ $v.tmp.sizeLimit }}}
  {{- if .computes }}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $v.shm.sizeLimit }}}
  {{- end }}
  {{- if and .answers $v.tls.existingSecret }}
  - name: tls
    secret: {secretName: {{ $v.tls.existingSecret | quote }}, defaultMode: 0440}
  {{- end }}
  {{- if and .answers $v.tls.clientCaSecret }}
  # Not the rest of it: an authority's Secret also has its key.
  - name: client-ca
    secret: {secretName: {{ $v.tls.clientCaSecret | quote }}, defaultMode: 0440, items: [{key: ca.crt, path: ca.crt}]}
  {{- end }}
  {{- if and .answers $v.apiKeys.existingSecret }}
  - name: api-keys
    secret: {secretName: {{ $v.apiKeys.existingSecret | quote }}, defaultMode: 0440}
  {{- end }}
  {{- if and (ne $v.topology "pod") $v.privatePlane.tls.workerSecret }}
  - name: plane
    secret: {secretName: {{ ternary $v.privatePlane.tls.coordinatorSecret $v.privatePlane.tls.workerSecret .answers | quote }}, defaultMode: 0440}
  {{- end }}
  {{- with $v.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $placed.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $placed.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $placed.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .computes }}
{{- with $v.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- end }}
{{- with $v.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $v.schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- end }}
