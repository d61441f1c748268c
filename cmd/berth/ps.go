package main

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type podRow struct {
	ID         string         `json:"id"`
	Namespace  string         `json:"namespace"`
	Name       string         `json:"name"`
	UID        string         `json:"uid"`
	Attempt    uint32         `json:"attempt"`
	State      string         `json:"state"`
	CreatedAt  time.Time      `json:"createdAt"`
	IPs        []string       `json:"ips"`
	Handler    string         `json:"runtimeHandler,omitempty"`
	Containers []containerRow `json:"containers"`
}

type containerRow struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Attempt   uint32    `json:"attempt"`
	State     string    `json:"state"`
	CreatedAt time.Time `json:"createdAt"`
	Image     string    `json:"image"`
	ImageID   string    `json:"imageID"`
}

func psCommand(e *env) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List pods and their containers",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			pods, err := e.pods(cmd.Context(), all)
			if err != nil {
				return err
			}
			if done, err := e.print(pods); done {
				return err
			}
			return table(e.out, psTable(pods, e.now()))
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also pods that are not ready and containers that do not run")
	return cmd
}

func psTable(pods []podRow, now time.Time) [][]string {
	rows := [][]string{{"POD / CONTAINER", "ID", "STATE", "AGE", "IP / IMAGE"}}
	for _, p := range pods {
		rows = append(rows, []string{p.Namespace + "/" + p.Name, short(p.ID), p.State, age(now.Sub(p.CreatedAt)), strings.Join(p.IPs, " ")})
		for _, c := range p.Containers {
			rows = append(rows, []string{"  " + c.Name, short(c.ID), c.State, age(now.Sub(c.CreatedAt)), c.Image})
		}
	}
	return rows
}

// pods lists pods with their containers, by name, the newest attempt first.
func (e *env) pods(ctx context.Context, all bool) ([]podRow, error) {
	list, err := e.runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	containers, err := e.runtime().ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	byPod := map[string][]containerRow{}
	for _, c := range containers.Containers {
		if all || c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			byPod[c.PodSandboxId] = append(byPod[c.PodSandboxId], containerRow{
				ID: c.Id, Name: c.Metadata.GetName(), Attempt: c.Metadata.GetAttempt(), State: containerState(c.State),
				CreatedAt: time.Unix(0, c.CreatedAt).UTC(), Image: c.Image.GetImage(), ImageID: c.ImageId,
			})
		}
	}
	out := []podRow{}
	for _, p := range list.Items {
		if !all && p.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			continue
		}
		m := p.Metadata
		row := podRow{
			ID: p.Id, Namespace: m.GetNamespace(), Name: m.GetName(), UID: m.GetUid(), Attempt: m.GetAttempt(), State: podState(p.State),
			CreatedAt: time.Unix(0, p.CreatedAt).UTC(), Handler: p.RuntimeHandler, IPs: []string{}, Containers: byPod[p.Id],
		}
		if row.Containers == nil {
			row.Containers = []containerRow{}
		}
		slices.SortFunc(row.Containers, func(a, b containerRow) int {
			return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(b.Attempt, a.Attempt), cmp.Compare(a.ID, b.ID))
		})
		// Addresses are in the status only. A pod that went away meanwhile has none.
		if s, err := e.runtime().PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.Id}); err == nil {
			row.IPs = append(row.IPs, addresses(s.Status.GetNetwork())...)
		}
		out = append(out, row)
	}
	slices.SortFunc(out, func(a, b podRow) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(b.Attempt, a.Attempt), cmp.Compare(a.ID, b.ID))
	})
	return out, nil
}

func addresses(n *runtimeapi.PodSandboxNetworkStatus) []string {
	var out []string
	if n.GetIp() != "" {
		out = append(out, n.Ip)
	}
	for _, a := range n.GetAdditionalIps() {
		out = append(out, a.Ip)
	}
	return out
}

func podState(s runtimeapi.PodSandboxState) string {
	if s == runtimeapi.PodSandboxState_SANDBOX_READY {
		return "ready"
	}
	return "not ready"
}

func containerState(s runtimeapi.ContainerState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "CONTAINER_"))
}
