{{/*
Names are fixed, whatever the release is called: steps, DAGs and other releases refer to them. One installation fits
into a namespace; Helm itself refuses a second one.
*/}}

{{/* Labels of an object. Takes (list root component). */}}
{{- define "slipstream.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: slipstream
{{ include "slipstream.selector" . }}
{{- end }}

{{/* Labels that pods are selected by; they never change. Takes (list root component). */}}
{{- define "slipstream.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: slipstream
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Labels of this chart's pods. Not the chart's version: a new chart alone restarts nothing. Takes (list root component). */}}
{{- define "slipstream.podLabels" -}}
{{ include "slipstream.selector" . }}
app.kubernetes.io/part-of: slipstream
{{- end }}

{{/* An image. Takes (list root environment). */}}
{{- define "slipstream.image" -}}
{{- $root := index . 0 -}}
{{- $images := $root.Values.images -}}
{{- with $images.registry }}{{ trimSuffix "/" . }}/{{ end -}}
slipstream-{{ index . 1 }}:{{ $images.tag | default $root.Chart.AppVersion }}
{{- end }}

{{- define "slipstream.mlflow" -}}
{{- if .Values.mlflow.enabled -}}
http://slipstream-mlflow.{{ .Release.Namespace }}.svc:5000
{{- else -}}
{{ required "mlflow.url: give the address of your MLflow server, or set mlflow.enabled" .Values.mlflow.url }}
{{- end -}}
{{- end }}

{{/* Where steps and the receiver find specs. */}}
{{- define "slipstream.specs" -}}
{{- if and .Values.specs.location .Values.specs.files -}}
{{ fail "specs: give either specs.files or specs.location, not both: a spec must have one place" }}
{{- end -}}
{{ .Values.specs.location | default "/etc/slipstream/specs" }}
{{- end }}

{{/* The claim that steps keep their cache in; empty when they keep it as long as their pod. */}}
{{- define "slipstream.cacheClaim" -}}
{{- if .Values.cache.enabled }}{{ .Values.cache.existingClaim | default "slipstream-cache" }}{{ end -}}
{{- end }}

{{/* Account of the model servers. */}}
{{- define "slipstream.serving" -}}
{{ .Values.kserve.serviceAccount | default "slipstream-serving" }}
{{- end }}

{{/* Port of a URL. */}}
{{- define "slipstream.port" -}}
{{- $url := urlParse . -}}
{{- if regexMatch ":[0-9]+$" $url.host -}}
{{ regexFind "[0-9]+$" $url.host }}
{{- else -}}
{{ ternary 443 80 (eq $url.scheme "https") }}
{{- end -}}
{{- end }}

{{/* Secrets whose keys become environment variables of every step, as JSON. */}}
{{- define "slipstream.stepSecrets" -}}
{{ concat (compact (list .Values.storage.secret .Values.mlflow.login .Values.signing.secret)) .Values.steps.secrets | default list | toJson }}
{{- end }}

{{- define "slipstream.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Pod fields of the restricted profile. */}}
{{- define "slipstream.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  {{- with .Values.podSecurity.runAsUser }}
  runAsUser: {{ int64 . }}
  {{- end }}
  {{- with .Values.podSecurity.runAsGroup }}
  runAsGroup: {{ int64 . }}
  fsGroup: {{ int64 . }}
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
# Service links would add variables such as SLIPSTREAM_MLFLOW_PORT=tcp://… to ours.
enableServiceLinks: false
{{- end }}

{{- define "slipstream.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* MLflow's log-in, for its clients. Takes the root. */}}
{{- define "slipstream.mlflowLogin" -}}
{{- with .Values.mlflow.login }}
{{ include "slipstream.fromSecret" (list "MLFLOW_TRACKING_USERNAME" . "MLFLOW_TRACKING_USERNAME") }}
{{ include "slipstream.fromSecret" (list "MLFLOW_TRACKING_PASSWORD" . "MLFLOW_TRACKING_PASSWORD") }}
{{- end }}
{{- end }}

{{/* Addresses and credentials, as environment variables. */}}
{{- define "slipstream.envFrom" -}}
envFrom:
  - configMapRef: {name: slipstream-environment}
  {{- with .Values.storage.secret }}
  - secretRef: {name: {{ . }}}
  {{- end }}
{{- end }}

{{/* What every pod of slipstream finds in its environment. */}}
{{- define "slipstream.environment" -}}
MLFLOW_TRACKING_URI: {{ include "slipstream.mlflow" . | quote }}
# Retries after 0, 2, 4, … s: a server that is away for a minute costs a step nothing but time.
MLFLOW_HTTP_REQUEST_MAX_RETRIES: "8"
MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR: "1"
MLFLOW_DISABLE_TELEMETRY: "true"
GIT_PYTHON_REFRESH: quiet
{{- with .Values.storage.endpoint }}
AWS_ENDPOINT_URL: {{ . | quote }}
{{- end }}
{{- with .Values.storage.region }}
AWS_DEFAULT_REGION: {{ . | quote }}
{{- end }}
SLIPSTREAM_SPECS: {{ include "slipstream.specs" . | quote }}
SLIPSTREAM_RUNS: {{ .Values.runs | quote }}
SLIPSTREAM_SETTINGS: /etc/slipstream/settings/settings.yaml
{{- if .Values.kserve.enabled }}
SLIPSTREAM_TRAFFIC: kserve
SLIPSTREAM_RELEASES: {{ .Values.kserve.releases | quote }}
{{- with .Values.kserve.ingress }}
SLIPSTREAM_INGRESS: {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* A variable from a Secret. Takes (list name secret key). */}}
{{- define "slipstream.fromSecret" -}}
- name: {{ index . 0 }}
  valueFrom: {secretKeyRef: {name: {{ index . 1 }}, key: {{ index . 2 }}}}
{{- end }}

{{- define "slipstream.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Resources by step: those of the node pools, then those that are given for the step. */}}
{{- define "slipstream.resources" -}}
{{- $found := dict -}}
{{- range $pool := .Values.steps.nodePools -}}
  {{- range $step := $pool.steps -}}
    {{- $_ := set $found $step (mergeOverwrite (get $found $step | default dict) (omit (deepCopy $pool) "steps")) -}}
  {{- end -}}
{{- end -}}
{{- range $step, $given := .Values.steps.resources -}}
  {{- $_ := set $found $step (mergeOverwrite (get $found $step | default dict) (deepCopy $given)) -}}
{{- end -}}
{{ toYaml $found }}
{{- end }}
