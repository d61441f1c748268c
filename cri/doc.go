// Package cri is the CRI v1 front door: it validates requests, converts them to
// the engine's values (cri/convert) and calls the engine (engine.go).
package cri
