package checknode

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// WriteText writes a report for people.
func (r *Report) WriteText(w io.Writer) {
	fmt.Fprintf(w, "containerd   %s%s, configuration version %d: %s\n", cmp.Or(r.Containerd.Version, "of unknown version"),
		map[bool]string{true: " or later (assumed)"}[r.Containerd.Assumed], r.Containerd.Schema, strings.Join(r.Containerd.Files, ", "))
	fmt.Fprintf(w, "tatami-host  %s\n", r.Host.File)
	for _, s := range r.Host.Snapshotters {
		fmt.Fprintf(w, "             %s: %s\n", s.Name, strings.Join(append([]string{s.Mode}, s.Fallback...), ", else "))
	}
	if r.Kernel != "" {
		fmt.Fprintf(w, "kernel       %s\n", r.Kernel)
	}
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "HANDLER\tRUNTIME\tSNAPSHOTTER\tMODE\tRESULT")
	for _, h := range r.Handlers {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", h.Name, h.Runtime, h.Snapshotter, cmp.Or(h.Mode, "-"), h.result())
	}
	_ = tw.Flush() // writes to w, as Fprintf does
	writeFindings(w, "node", r.Findings)
	for _, h := range r.Handlers {
		writeFindings(w, h.Name, h.Findings)
	}
}

func (h *Handler) result() string {
	switch {
	case h.Mode == "":
		return "not Tatami"
	case h.Works:
		return "works"
	}
	return "does not work"
}

func writeFindings(w io.Writer, of string, list []Finding) {
	if len(list) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s\n", of)
	for _, f := range list {
		fmt.Fprintf(w, "  %s: %s\n", f.Severity, f.What)
		if f.File != "" {
			fmt.Fprintf(w, "    %s\n", f.File)
		}
		for _, l := range f.Add {
			fmt.Fprintf(w, "    + %s\n", l)
		}
	}
}
