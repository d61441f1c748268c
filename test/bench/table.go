package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// table writes a Markdown table of the results in files: for each metric the
// median over the runs of each runtime, and how the others compare with the
// first. Runs are told apart by the name in them.
func table(w io.Writer, files []string) error {
	if len(files) == 0 {
		return errors.New("usage: bench table RESULT.json [RESULT.json...]")
	}
	var all []*result
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		r := &result{}
		if err := json.Unmarshal(b, r); err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
		all = append(all, r)
	}
	writeTable(w, all)
	return nil
}

// row is one line: for each runtime the values of its runs.
type row struct {
	part, name, unit string
	values           map[string][]float64
}

func writeTable(w io.Writer, all []*result) {
	var names []string
	runs, versions := map[string]int{}, map[string]string{}
	var rows []*row
	for _, r := range all {
		if !slices.Contains(names, r.Name) {
			names = append(names, r.Name)
		}
		runs[r.Name]++
		versions[r.Name] = r.Runtime
		for _, m := range r.Metrics {
			rows = addRow(rows, r.Name, m, m.Name, m.P50)
			if m.N >= 10 && m.Unit == "ms" {
				rows = addRow(rows, r.Name, m, m.Name+" p99", m.P99)
			}
		}
	}
	for _, n := range names {
		fmt.Fprintf(w, "- %s: %s, %d runs\n", n, versions[n], runs[n])
	}
	fmt.Fprintf(w, "- kernel %s, %d CPUs; medians over the runs\n\n", all[0].Kernel, all[0].CPUs)
	fmt.Fprint(w, "| part | what | unit |")
	for i, n := range names {
		fmt.Fprintf(w, " %s |", n)
		if i > 0 {
			fmt.Fprintf(w, " %s / %s |", n, names[0])
		}
	}
	fmt.Fprintf(w, "\n|---|---|---|%s\n", strings.Repeat("---:|", 2*len(names)-1))
	for _, r := range rows {
		fmt.Fprintf(w, "| %s | %s | %s |", r.part, r.name, r.unit)
		first, ok := median(r.values[names[0]])
		for i, n := range names {
			v, here := median(r.values[n])
			cell := "–"
			if here {
				cell = number(v)
			}
			fmt.Fprintf(w, " %s |", cell)
			if i == 0 {
				continue
			}
			if !ok || !here || first <= 0 {
				fmt.Fprint(w, " – |")
				continue
			}
			fmt.Fprintf(w, " %s× |", number(v/first))
		}
		fmt.Fprintln(w)
	}
}

// addRow puts a value into the row of its metric. A new row goes behind the last
// one of its part, so that parts stay together when one runtime has fewer rows.
func addRow(rows []*row, runtime string, m *metric, name string, v float64) []*row {
	at := len(rows)
	for i, r := range rows {
		if r.part != m.Part {
			continue
		}
		if r.name == name {
			r.values[runtime] = append(r.values[runtime], v)
			return rows
		}
		at = i + 1
	}
	return slices.Insert(rows, at, &row{m.Part, name, m.Unit, map[string][]float64{runtime: {v}}})
}

func median(v []float64) (float64, bool) {
	if len(v) == 0 {
		return 0, false
	}
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2, true
	}
	return v[len(v)/2], true
}
