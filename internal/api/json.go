package api

import (
	"bytes"
	"encoding/json"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// JSON returns the form of a message that `-o json` prints: lower_snake names, every field present, 64-bit numbers as
// numbers (protojson would quote them), times in RFC 3339 with nanoseconds or null.
func JSON(m proto.Message) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(jsonMessage(m.ProtoReflect())); err != nil {
		return nil, err
	}
	return bytes.TrimRight(b.Bytes(), "\n"), nil
}

// JSONValue is JSON before encoding: for a list of messages, or one field of many.
func JSONValue(m proto.Message) any { return jsonMessage(m.ProtoReflect()) }

// object keeps the fields in the order of the proto file, which maps would lose.
type object []member

type member struct {
	name  string
	value any
}

func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		if err := enc.Encode(m.name); err != nil {
			return nil, err
		}
		b.WriteByte(':')
		if err := enc.Encode(m.value); err != nil {
			return nil, err
		}
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

func jsonMessage(m protoreflect.Message) any {
	switch x := m.Interface().(type) {
	case *timestamppb.Timestamp:
		if !m.IsValid() {
			return nil
		}
		return x.AsTime().Format(time.RFC3339Nano)
	case *structpb.Struct:
		return x.AsMap()
	}
	if !m.IsValid() {
		return nil
	}
	fields := m.Descriptor().Fields()
	out := make(object, 0, fields.Len())
	for i := range fields.Len() {
		f := fields.Get(i)
		out = append(out, member{string(f.Name()), jsonField(f, m.Get(f))})
	}
	return out
}

func jsonField(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	switch {
	case f.IsList():
		list := make([]any, 0, v.List().Len())
		for i := range v.List().Len() {
			list = append(list, jsonScalar(f, v.List().Get(i)))
		}
		return list
	case f.IsMap():
		out := map[string]any{}
		v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			out[k.String()] = jsonScalar(f.MapValue(), v)
			return true
		})
		return out
	}
	return jsonScalar(f, v)
}

func jsonScalar(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	if f.Kind() == protoreflect.MessageKind {
		return jsonMessage(v.Message())
	}
	return v.Interface()
}
