// Package kube finds credentials in all places of a Kubernetes node: those of package
// credentials, the kubelet's credential providers, and the pull secrets of the cluster
// by kubeconfig. A provider's answer is cached as the provider says, and the cluster is
// watched; both in memory only.
package kube
