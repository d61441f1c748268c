package registry

import "strings"

// challenge is one entry of WWW-Authenticate (RFC 9110 section 11.6.1).
type challenge struct {
	scheme string // lower case
	params map[string]string
}

// parseChallenges reads all WWW-Authenticate values of a response. What it does
// not understand it leaves out: an unknown scheme must not hide a known one.
func parseChallenges(values []string) []challenge {
	var out []challenge
	for _, s := range values {
		for {
			s = strings.TrimLeft(s, " \t,")
			scheme, rest := token(s)
			if scheme == "" {
				break
			}
			c := challenge{scheme: strings.ToLower(scheme), params: map[string]string{}}
			s = c.readParams(rest)
			out = append(out, c)
		}
	}
	return out
}

// readParams reads key=value pairs up to the next challenge and returns the rest.
func (c *challenge) readParams(s string) string {
	for {
		s = strings.TrimLeft(s, " \t,")
		key, rest := token(s)
		rest = strings.TrimLeft(rest, " \t")
		if key == "" || !strings.HasPrefix(rest, "=") {
			return s // the start of the next challenge, or the end
		}
		rest = strings.TrimLeft(rest[1:], " \t")
		var val string
		if strings.HasPrefix(rest, `"`) {
			var ok bool
			if val, rest, ok = quoted(rest); !ok {
				return ""
			}
		} else {
			val, rest = token(rest)
			if val == "" {
				return ""
			}
		}
		c.params[strings.ToLower(key)] = val
		s = rest
	}
}

func token(s string) (tok, rest string) {
	i := strings.IndexFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune(`()<>@,;\"/[]?={}`, r)
	})
	if i < 0 {
		return s, ""
	}
	return s[:i], s[i:]
}

func quoted(s string) (val, rest string, ok bool) {
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), s[i+1:], true
		case '\\':
			if i++; i == len(s) {
				return "", "", false
			}
		}
		b.WriteByte(s[i])
	}
	return "", "", false
}
