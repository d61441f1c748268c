package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// serve ADDR: an HTTP server on ADDR (":8080") that says hello, tells the path
// asked for and the host name, and prints a line per request.
//
// It speaks just enough HTTP/1.0 by hand: net/http would triple the size of the
// program and the time that every other command takes to start.
func serve(args []string) int {
	addr := ":8080"
	if len(args) > 0 {
		addr = args[0]
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return complain(err)
	}
	fmt.Println("serving on", l.Addr())
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go answer(c)
		}
	}()
	<-terminated()
	return 0
}

func answer(c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		return
	}
	for {
		h, err := r.ReadString('\n')
		if err != nil {
			return
		}
		if strings.TrimSpace(h) == "" {
			break
		}
	}
	f := strings.Fields(line)
	if len(f) < 2 {
		fmt.Fprint(c, "HTTP/1.0 400 Bad Request\r\n\r\n")
		return
	}
	host, _ := os.Hostname()
	body := fmt.Sprintf("hello from %s, you asked for %s\n", host, f[1])
	fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	fmt.Printf("%s %s from %s\n", f[0], f[1], c.RemoteAddr())
}

// get HOST:PORT [PATH]: prints the body of an HTTP answer.
func get(args []string) int {
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "get HOST:PORT [PATH]")
		return 2
	}
	path := "/"
	if len(args) > 1 {
		path = args[1]
	}
	c, err := net.DialTimeout("tcp", args[0], 5*time.Second)
	if err != nil {
		return complain(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintf(c, "GET %s HTTP/1.0\r\nHost: %s\r\n\r\n", path, args[0])
	body := false
	for s := bufio.NewScanner(c); s.Scan(); {
		if body {
			fmt.Println(s.Text())
		}
		body = body || s.Text() == ""
	}
	if !body {
		fmt.Fprintln(os.Stderr, "no whole HTTP answer")
		return 1
	}
	return 0
}

// resolve NAME: the addresses of NAME, one a line.
func resolve(args []string) int {
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "resolve NAME")
		return 2
	}
	addrs, err := net.LookupHost(args[0])
	if err != nil {
		return complain(err)
	}
	fmt.Println(strings.Join(addrs, "\n"))
	return 0
}

// listen NETWORK ADDR: listens ("tcp" ":80", "udp" ":53"), prints "listening",
// and sends back what comes.
func listen(args []string) int {
	if len(args) < 2 {
		fmt.Fprintln(os.Stderr, "listen NETWORK ADDR")
		return 2
	}
	if strings.HasPrefix(args[0], "udp") {
		c, err := net.ListenPacket(args[0], args[1])
		if err != nil {
			return complain(err)
		}
		fmt.Println("listening on", c.LocalAddr())
		buf := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return complain(err)
			}
			if _, err := c.WriteTo(buf[:n], from); err != nil {
				return complain(err)
			}
		}
	}
	l, err := net.Listen(args[0], args[1])
	if err != nil {
		return complain(err)
	}
	fmt.Println("listening on", l.Addr())
	for {
		c, err := l.Accept()
		if err != nil {
			return complain(err)
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}
