# Sourced: start_registry DIR starts Debian's docker-registry with its storage
# in DIR, on a free port of the loopback, and sets REGISTRY to host:port.
# stop_registry ends it.

start_registry() {
	mkdir -p "$1"
	port=$(python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])' 2>/dev/null || echo 15911)
	REGISTRY=127.0.0.1:$port
	cat >"$1/config.yml" <<-YAML
		version: 0.1
		log: {level: error}
		storage:
		  filesystem: {rootdirectory: $1/data}
		  delete: {enabled: true}
		http: {addr: $REGISTRY}
	YAML
	docker-registry serve "$1/config.yml" >"$1/log" 2>&1 &
	REGISTRY_PID=$!
	for _ in $(seq 100); do
		kill -0 "$REGISTRY_PID" 2>/dev/null || { cat "$1/log" >&2; return 1; }
		if skopeo list-tags --tls-verify=false "docker://$REGISTRY/none" 2>&1 | grep -q -e unknown -e 404; then return 0; fi
		sleep 0.1
	done
	echo "the registry on $REGISTRY does not answer: $(tail -n 3 "$1/log")" >&2
	return 1
}

stop_registry() {
	[ -z "${REGISTRY_PID:-}" ] || kill "$REGISTRY_PID" 2>/dev/null || :
}
