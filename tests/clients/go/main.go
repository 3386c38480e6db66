// grpc-go against the real server, with stubs that protoc makes from proto/.
//
//	grpc_go EXPECTED TARGET TARGET_OF_ONE
//
// EXPECTED is the demo model's known answers, TARGET a server and TARGET_OF_ONE
// one that runs one request and queues one. Ends with 0 and a line of what was
// seen, or with 1 and what was wrong.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"lockstep.test/clients/lockstepv1"
)

const service = "lockstep.v1.Inference"

type known struct {
	Messages []struct{ Role, Content string }
	Prompt   []uint32 `json:"prompt_token_ids"`
	Greedy   []uint32 `json:"greedy_token_ids"`
	Text     string
}

func (k *known) chat() *lockstepv1.GenerateRequest {
	chat := &lockstepv1.ChatMessages{}
	for _, m := range k.Messages {
		chat.Messages = append(chat.Messages, &lockstepv1.ChatMessage{Role: m.Role, Content: m.Content})
	}
	return &lockstepv1.GenerateRequest{
		Prompt:   &lockstepv1.GenerateRequest_Chat{Chat: chat},
		Sampling: &lockstepv1.SamplingParams{Temperature: proto.Float32(0)},
	}
}

func (k *known) ids() *lockstepv1.GenerateRequest {
	request := k.chat()
	request.Prompt = &lockstepv1.GenerateRequest_TokenIds{TokenIds: &lockstepv1.TokenIds{Ids: k.Prompt}}
	return request
}

func text(prompt string, sampling *lockstepv1.SamplingParams) *lockstepv1.GenerateRequest {
	return &lockstepv1.GenerateRequest{
		Prompt: &lockstepv1.GenerateRequest_Text{Text: prompt}, Sampling: sampling}
}

func long() *lockstepv1.GenerateRequest {
	return text("Tell me", &lockstepv1.SamplingParams{MaxTokens: proto.Uint32(1500),
		Temperature: proto.Float32(0), IgnoreEos: proto.Bool(true)})
}

// A streamed answer: its text, its tokens and the error it ended with, if any.
func read(stream lockstepv1.Inference_GenerateStreamClient, onEvent func(count int)) (string, []uint32, error) {
	var said strings.Builder
	var ids []uint32
	for count := 1; ; count++ {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return said.String(), ids, nil
		}
		if err != nil {
			return said.String(), ids, err
		}
		if (count == 1) != (event.GetPrompt() != nil) {
			return "", nil, fmt.Errorf("event %d is %v", count, event)
		}
		said.WriteString(event.GetChunk().GetText())
		ids = append(ids, event.GetChunk().GetTokenIds()...)
		if onEvent != nil {
			onEvent(count)
		}
	}
}

func expectCode(what string, err error, code codes.Code, mentions string) error {
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), mentions) {
		return fmt.Errorf("%s: wanted %v with %q, got %v", what, code, mentions, err)
	}
	return nil
}

func answers(ctx context.Context, client lockstepv1.InferenceClient, all []known) error {
	for _, k := range all[:12] {
		whole, err := client.Generate(ctx, k.chat())
		if err != nil {
			return err
		}
		got := whole.Completions[0]
		if got.Text != k.Text || !slices.Equal(got.TokenIds, k.Greedy) ||
			got.Finish.Reason != lockstepv1.FinishReason_FINISH_REASON_STOP {
			return fmt.Errorf("wanted %q, got %v", k.Text, got)
		}
		told, err := client.Tokenize(ctx, &lockstepv1.TokenizeRequest{
			Input: &lockstepv1.TokenizeRequest_Chat{Chat: k.chat().GetChat()}})
		if err != nil || !slices.Equal(told.TokenIds, k.Prompt) {
			return fmt.Errorf("tokens of %v: %v, %w", k.Messages, told, err)
		}
		back, err := client.Detokenize(ctx, &lockstepv1.DetokenizeRequest{TokenIds: k.Greedy})
		if err != nil || !strings.HasPrefix(back.Text, k.Text) {
			return fmt.Errorf("text of %v: %v, %w", k.Greedy, back, err)
		}
	}
	// Every stream at once, over one connection.
	failures := make([]error, len(all))
	var streams sync.WaitGroup
	for i := range all {
		streams.Go(func() {
			stream, err := client.GenerateStream(ctx, all[i].ids())
			if err != nil {
				failures[i] = err
				return
			}
			said, ids, err := read(stream, nil)
			if err != nil || said != all[i].Text || !slices.Equal(ids, all[i].Greedy) {
				failures[i] = fmt.Errorf("wanted %q, got %q, %w", all[i].Text, said, err)
			}
		})
	}
	streams.Wait()
	info, err := client.GetModelInfo(ctx, &lockstepv1.GetModelInfoRequest{})
	if err == nil && (!info.Ready || info.TpSize != 2 || len(info.Ranks) != 2) {
		err = fmt.Errorf("model info %v", info)
	}
	return errors.Join(append(failures, err)...)
}

func health(ctx context.Context, connection *grpc.ClientConn) error {
	client := grpc_health_v1.NewHealthClient(connection)
	for _, name := range []string{"", service} {
		answer, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: name})
		if err != nil || answer.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			return fmt.Errorf("health of %q: %v, %w", name, answer, err)
		}
	}
	_, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "nobody"})
	if err := expectCode("health of nobody", err, codes.NotFound, ""); err != nil {
		return err
	}
	watching, stop := context.WithCancel(ctx)
	defer stop()
	watch, err := client.Watch(watching, &grpc_health_v1.HealthCheckRequest{Service: service})
	if err != nil {
		return err
	}
	first, err := watch.Recv()
	if err != nil || first.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("watch: %v, %w", first, err)
	}
	stop()
	_, err = watch.Recv()
	return expectCode("a cancelled watch", err, codes.Canceled, "")
}

func refusals(ctx context.Context, client lockstepv1.InferenceClient) error {
	for field, sampling := range map[string]*lockstepv1.SamplingParams{
		"temperature": {Temperature: proto.Float32(3)}, "top_p": {TopP: proto.Float32(0)},
		"logprobs": {Logprobs: proto.Uint32(21)}, "max_tokens": {MaxTokens: proto.Uint32(5000)},
		"n": {N: proto.Uint32(17)}, "logit_bias": {LogitBias: map[uint32]float32{5: 101}},
	} {
		_, err := client.Generate(ctx, text("x", sampling))
		if err := expectCode(field, err, codes.InvalidArgument, field); err != nil {
			return err
		}
		stream, err := client.GenerateStream(ctx, text("x", sampling))
		if err != nil {
			return err
		}
		_, _, err = read(stream, nil)
		if err := expectCode(field+" of a stream", err, codes.InvalidArgument, field); err != nil {
			return err
		}
	}
	short, done := context.WithTimeout(ctx, 300*time.Millisecond)
	defer done()
	_, err := client.Generate(short, long())
	if err := expectCode("a short deadline", err, codes.DeadlineExceeded, ""); err != nil {
		return err
	}
	leaving, leave := context.WithCancel(ctx)
	defer leave()
	stream, err := client.GenerateStream(leaving, long())
	if err != nil {
		return err
	}
	_, ids, err := read(stream, func(count int) {
		if count == 4 {
			leave()
		}
	})
	if len(ids) < 2 {
		return fmt.Errorf("cancelled after %d tokens", len(ids))
	}
	return expectCode("a cancelled stream", err, codes.Canceled, "")
}

// One runs, one of four waits, the others learn when to come back.
func crowd(ctx context.Context, client lockstepv1.InferenceClient) error {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	running, err := client.GenerateStream(ctx, long())
	if err != nil {
		return err
	}
	for range 2 { // the prompt, then a token: it runs
		if _, err := running.Recv(); err != nil {
			return err
		}
	}
	type end struct {
		err      error
		trailers metadata.MD
	}
	ends := make(chan end, 4)
	for range cap(ends) {
		go func() {
			stream, err := client.GenerateStream(ctx, long())
			if err != nil {
				ends <- end{err: err}
				return
			}
			_, _, err = read(stream, nil)
			ends <- end{err, stream.Trailer()}
		}()
	}
	for range cap(ends) - 1 {
		refused := <-ends
		if err := expectCode("a full queue", refused.err, codes.ResourceExhausted, ""); err != nil {
			return err
		}
		if len(refused.trailers.Get("grpc-retry-pushback-ms")) != 1 {
			return fmt.Errorf("trailers without a pushback: %v", refused.trailers)
		}
		details := status.Convert(refused.err).Details()
		if len(details) != 1 {
			return fmt.Errorf("details of a full queue: %v", details)
		}
		retry, ok := details[0].(*errdetails.RetryInfo)
		if !ok || retry.RetryDelay.AsDuration() < time.Second {
			return fmt.Errorf("retry info of a full queue: %v", details)
		}
	}
	leave()
	return expectCode("the one that waited", (<-ends).err, codes.Canceled, "")
}

func run(arguments []string) error {
	if len(arguments) != 3 {
		return errors.New("usage: grpc_go EXPECTED TARGET TARGET_OF_ONE")
	}
	data, err := os.ReadFile(arguments[0])
	if err != nil {
		return err
	}
	var expected struct{ Cases []known }
	if err := json.Unmarshal(data, &expected); err != nil {
		return err
	}
	ctx, done := context.WithTimeout(context.Background(), 100*time.Second)
	defer done()
	var connections [2]*grpc.ClientConn
	for i := range connections {
		connections[i], err = grpc.NewClient(
			arguments[1+i], grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer connections[i].Close()
	}
	client := lockstepv1.NewInferenceClient(connections[0])
	for _, check := range []func() error{
		func() error { return answers(ctx, client, expected.Cases) },
		func() error { return health(ctx, connections[0]) },
		func() error { return refusals(ctx, client) },
		func() error { return crowd(ctx, lockstepv1.NewInferenceClient(connections[1])) },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	fmt.Printf("grpc-go %s: calls, streams, health, refusals, deadlines, cancels, retry info\n", grpc.Version)
	return nil
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "grpc_go:", err)
		os.Exit(1)
	}
}
