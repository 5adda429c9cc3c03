package store_test

import (
	"context"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// scanned uses four online images again and again while, when there is a scan, a batch
// sandbox that has one image of three times the quota open reads all of that. It
// returns how many bytes of the online images were fetched in the second half.
func scanned(t *testing.T, scan bool) (online int64, space store.Space) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true, Quota: 9 * miB, High: 7 * miB, Low: 6 * miB, Dedup: -1}
	s := openSmall(t, cfg)
	var images []*storetest.Image
	for n := range 4 {
		images = append(images, solid(n+1, miB))
	}
	src := storetest.NewSource("good", images...)
	for _, img := range images {
		useAll(t, s, img, false, src)
	}
	before := src.Bytes()
	large := storetest.NewImage("large", storetest.Solid(10, 14*miB), storetest.Solid(11, 13*miB))
	job := openImage(t, s, large, storetest.NewSource("good", large))
	job.SetFlow(flowOf(true))
	const step = miB
	for off, n := int64(0), 0; off < int64(len(large.Plain)); off, n = off+step, n+1 {
		if scan {
			for at := off; at < min(off+step, int64(len(large.Plain))); at += step / 4 {
				same(t, job, large.Plain, at, step/4)
			}
		}
		useAll(t, s, images[n%len(images)], false, src)
	}
	space = s.Space()
	check(t, s.Close())
	return src.Bytes() - before, space
}

// A batch sandbox that reads three times the quota of an image which it has open all the
// time costs those that start, read and end meanwhile at most 5 points of what they
// find.
func TestBatchScanOfOpenImage(t *testing.T) {
	quiet, _ := scanned(t, false)
	fetched, space := scanned(t, true)
	reads := float64(28 * miB)
	if lost := float64(fetched-quiet) / reads * 100; lost > 5 {
		t.Errorf("the scan costs %.1f points: %d bytes were fetched again, %d without it", lost, fetched, quiet)
	}
	if space.Evicted < 10*miB {
		t.Errorf("the scan makes no way for itself: %+v", space)
	}
}

// What online has used makes no way for batch, open or not: what batch brings is
// delivered and not kept. For online it does.
func TestBatchFindsNoRoom(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true, Quota: 8 * miB, High: 7 * miB, Low: 5 * miB, Dedup: -1}
	s := openSmall(t, cfg)
	pod, job, next := solid(1, 13*miB/2), solid(2, 4*miB), solid(3, 2*miB)
	src := storetest.NewSource("good", pod, job, next)
	useAll(t, s, pod, false, src)
	useAll(t, s, job, true, src)
	useAll(t, s, job, true, src)
	wantPresent(t, s, pod, all(pod))
	if sp := s.Space(); sp.Refused == 0 || sp.Used > cfg.Quota {
		t.Errorf("batch was not refused: %+v", sp)
	}
	for range 2 { // what comes before room was made is not kept
		useAll(t, s, next, false, src)
	}
	wantPresent(t, s, next, all(next))
	if sp := s.Space(); sp.Used > cfg.High {
		t.Errorf("online found no room: %+v", sp)
	}
}

// An image that batch has open makes way for online, but for what others have open
// or have used.
func TestOpenOfBatchMakesWay(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true, Dedup: -1}
	s := openSmall(t, cfg)
	own, common, used := storetest.Solid(1, 2*miB), storetest.Solid(2, 2*miB), storetest.Solid(3, 2*miB)
	shared := storetest.NewImage("job", own, common, used)
	pod, gone := storetest.NewImage("pod", common), storetest.NewImage("gone", used)
	src := storetest.NewSource("good", shared, pod, gone)
	useAll(t, s, gone, false, src)
	j := openImage(t, s, shared, src)
	j.SetFlow(flowOf(true))
	p := openImage(t, s, pod, src)
	p.SetFlow(flowOf(false))
	check(t, j.Fill(context.Background()))
	for range 20 {
		s.Press()
		settle(t, s)
	}
	if sp := s.Space(); sp.Evicted != 2*miB {
		t.Errorf("%d bytes made way, not the 2 MiB that only batch has", sp.Evicted)
	}
	if !p.Complete() {
		t.Error("an open image of online lost bytes")
	}
	wantPresent(t, s, gone, all(gone))
	sameAll(t, j, shared.Plain, 300*kiB)
	j.SetFlow(flowOf(false))
	before := s.Space().Evicted
	s.Press()
	settle(t, s)
	if n := s.Space().Evicted - before; n > 0 || !j.Complete() {
		t.Errorf("%d bytes made way of an image that is online's by now", n)
	}
}
