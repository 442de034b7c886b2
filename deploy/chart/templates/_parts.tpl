{{/* Labels that every object has. */}}
{{- define "fineserve.labels" -}}
app.kubernetes.io/name: fineserve
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "fineserve.selector" -}}
app.kubernetes.io/name: fineserve
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "fineserve.account" -}}
{{ .Values.serviceAccount.name | default (printf "%s-fineserve" .Release.Name) }}
{{- end }}

{{/* Environment of every process. */}}
{{- define "fineserve.environment" -}}
- name: FINESERVE_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ required "redis.secret: a Secret whose key url is Redis's address" .Values.redis.secret | quote }}, key: url}}
- name: FINESERVE_STORE_URL
  value: {{ required "store.url: the bucket of the artifacts" .Values.store.url | quote }}
- name: FINESERVE_WORKERS_ON_DEMAND
  value: {{ .Values.keda.enabled | quote }}
- name: FINESERVE_STORE_CACHE_GB
  value: {{ .Values.store.cacheGigabytes | quote }}
{{- range $name, $value := .Values.store.environment }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: FINESERVE_{{ $name | upper }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* What every container has: nothing that it does not need. */}}
{{- define "fineserve.container" -}}
imagePullPolicy: {{ .Values.images.pullPolicy }}
{{- with .Values.store.secret }}
envFrom:
  - secretRef: {name: {{ . | quote }}}
{{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "fineserve.pod" -}}
serviceAccountName: {{ include "fineserve.account" . }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.images.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}
