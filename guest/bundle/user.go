package bundle

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// lookUpUser translates "user", "user:group" or numbers in place of either by
// the files of the container at root. As with Docker, a user without a group
// has the primary and the supplementary groups of the files, and a number that
// is not in them has group 0.
func lookUpUser(root, name string) (specs.User, error) {
	userName, groupName, hasGroup := strings.Cut(name, ":")
	user, known, err := findUser(root, userName)
	if err != nil {
		return specs.User{}, err
	}
	if hasGroup {
		user.GID, err = findGroup(root, groupName)
		return user, err
	}
	if known != "" {
		user.AdditionalGids, err = groupsOf(root, known, user.GID)
	}
	return user, err
}

// findUser looks in /etc/passwd: name:password:uid:gid:… (passwd(5)). known is
// the name in the file.
func findUser(root, name string) (user specs.User, known string, err error) {
	number, isNumber := parseID(name)
	found := false
	err = eachLine(root, "/etc/passwd", func(f []string) bool {
		if len(f) < 4 || f[0] != name && (!isNumber || f[2] != name) {
			return true
		}
		uid, okU := parseID(f[2])
		gid, okG := parseID(f[3])
		if okU && okG {
			user, known, found = specs.User{UID: uid, GID: gid}, f[0], true
		}
		return !found
	})
	if err == nil && !found {
		user.UID = number
		if !isNumber {
			err = fmt.Errorf("user %q: not in /etc/passwd of the image: give a number: %w", name, errdefs.ErrNotFound)
		}
	}
	return user, known, err
}

// findGroup looks in /etc/group: name:password:gid:members (group(5)).
func findGroup(root, name string) (gid uint32, err error) {
	gid, found := parseID(name)
	if found {
		return gid, nil
	}
	err = eachLine(root, "/etc/group", func(f []string) bool {
		if len(f) >= 3 && f[0] == name {
			gid, found = parseID(f[2])
		}
		return !found
	})
	if err == nil && !found {
		err = fmt.Errorf("group %q: not in /etc/group of the image: give a number: %w", name, errdefs.ErrNotFound)
	}
	return gid, err
}

func groupsOf(root, user string, primary uint32) (gids []uint32, err error) {
	err = eachLine(root, "/etc/group", func(f []string) bool {
		if len(f) < 4 || !slices.Contains(strings.Split(f[3], ","), user) {
			return true
		}
		if gid, ok := parseID(f[2]); ok && gid != primary {
			gids = append(gids, gid)
		}
		return true
	})
	return gids, err
}

func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 31)
	return uint32(n), err == nil
}

// eachLine calls f with the colon-separated fields of each line until it
// returns false. A missing file has no lines.
func eachLine(root, path string, f func(fields []string) bool) error {
	data, err := readInRoot(root, path)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read %s of the image: %w", path, err)
	}
	for line := range strings.Lines(string(data)) {
		if !f(strings.Split(strings.TrimSuffix(line, "\n"), ":")) {
			return nil
		}
	}
	return nil
}
